"""Optional tools: converters, comparisons, benchmarks, costs, figures, and pages to look at."""
