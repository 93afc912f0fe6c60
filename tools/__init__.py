"""What serves some users: converters, comparisons, speed, costs, a page to look at. Nothing else imports it."""
