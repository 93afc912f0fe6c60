// Uses the three pages of tools/ as a reader would, in headless Chromium: mouse, keyboard and finger, light and dark,
// desk and phone.
//
//     node tests/page/check.mjs REPORT.html TRACE.html ADDRESS_OF_SERVE [FOLDER FOR SCREENSHOTS]
//
// A line for each check; the exit status is 1 if one fails. CHROMIUM names the browser where it is not /usr/bin/chromium.

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [file, traced, served, screenshots] = process.argv.slice(2);
if (!served) {
  console.error("error: give the pages to open: node tests/page/check.mjs REPORT.html TRACE.html ADDRESS_OF_SERVE [FOLDER FOR SCREENSHOTS]");
  process.exit(2);
}
const [report, trace] = [file, traced].map((name) => pathToFileURL(resolve(name)).href);
const PHONE = { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2 };
const DESK = { viewport: { width: 1280, height: 900 } };

let failures = 0;
function check(name, passed, seen = "") {
  console.log(`${passed ? "ok    " : "FAILED"} ${name}${passed || seen === "" ? "" : `: ${seen}`}`);
  failures += passed ? 0 : 1;
}

/** Every colour of every heat map of a card, and what it says, as text; equal if and only if nothing moved. */
const seenIn = (card) =>
  card.evaluate((node) => {
    const pixels = [...node.querySelectorAll("canvas")].map((one) => one.toDataURL());
    return { pixels: pixels.join(), said: node.querySelector(".where").textContent };
  });

/** Do something to a card and see its maps and its sentence change. */
async function moves(name, card, act) {
  const before = await seenIn(card);
  await act();
  const after = await seenIn(card);
  check(`${name}: the heat map moves`, before.pixels !== after.pixels);
  check(`${name}: the sentence below says so`, before.said !== after.said && after.said !== "", after.said);
}

async function findings(page, scheme) {
  await page.evaluate(axe);
  const result = await page.evaluate(() => window.axe.run(document));
  const grave = result.violations.filter((one) => ["serious", "critical"].includes(one.impact));
  const lesser = result.violations.filter((one) => !grave.includes(one)).map((one) => one.id);
  const seen = grave.map((one) => `${one.id} (${one.nodes.length}, such as ${one.nodes[0].target}: ${one.nodes[0].failureSummary})`);
  check(`axe-core finds nothing serious, ${scheme} (${result.passes.length} rules passed, lesser findings: ${lesser.join() || "none"})`, !grave.length, seen.join("; "));
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

/** A page of its own; what it complains of or asks the network for is a failure when it is closed. */
async function open(kind, options, address = report, ready = "#results table") {
  const context = await browser.newContext(options), page = await context.newPage(), complaints = [], requests = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(error.message));
  const own = (url) => url === address || url.startsWith("data:") || (address === served && url === new URL("/look", served).href);
  page.on("request", (request) => own(request.url()) || requests.push(request.url()));
  page.setDefaultTimeout(10_000);
  await page.goto(address);
  await page.waitForSelector(ready);
  return {
    page,
    shot: async (name, whole = true) => screenshots && (await page.screenshot({ path: `${screenshots}/${name}.png`, fullPage: whole })),
    close: async (expected = []) => {
      const heard = complaints.filter((one) => !expected.some((begin) => one.startsWith(begin)));
      check(`${kind}: no complaint of the page`, !heard.length, heard.join("; "));
      check(`${kind}: no request but the file itself`, !requests.length, requests.join("; "));
      await context.close();
    },
  };
}

const wide = (page) => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
const words = (card) => card.locator(".text button");

/** Before anything is touched a reader sees a whole picture, and a map over it. */
async function firstScreen(page, kind) {
  const first = page.locator(".card .frame").first(), box = await first.boundingBox(), { height } = page.viewportSize();
  check(`${kind}: a picture stands on the first screen`, box.y + box.height <= height, `it ends at ${Math.round(box.y + box.height)} of ${height} pixels`);
  check(`${kind}: it has a map before anything is touched`, await first.locator("canvas").evaluate((canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0)));
}

/** At the desk: mouse, keyboard, filter, then axe-core with a map on the page. */
async function atTheDesk(scheme) {
  const { page, shot, close } = await open(scheme, { ...DESK, colorScheme: scheme });
  check(`${scheme}: the parts stand in their order`, (await page.locator("main section").evaluateAll((all) => all.map((one) => one.id).join())) === "gallery,recovered,curves,results,about");
  await firstScreen(page, scheme);
  for (const [kind, name] of [[".card.words", "image to text"], [".card.query", "text to image"]]) {
    const card = page.locator(kind).first();
    await moves(`${scheme}, mouse, ${name}`, card, () => words(card).nth(1).hover());
    await moves(`${scheme}, mouse, ${name}, next word`, card, () => words(card).nth(2).hover());
  }

  await page.mouse.move(0, 0);
  const card = page.locator(".card.words").nth(1), untouched = await seenIn(card);
  await page.locator(".card.words").first().locator(".text").last().locator("button[tabindex='0']").focus();
  await moves(`${scheme}, Tab`, card, () => page.keyboard.press("Tab"));
  check(`${scheme}, Tab: the focus is on a word and can be seen`, await page.evaluate(() => document.activeElement.matches(".text button:focus-visible") && getComputedStyle(document.activeElement).outlineStyle !== "none"));
  await moves(`${scheme}, arrow key`, card, () => page.keyboard.press("ArrowRight"));
  await moves(`${scheme}, Tab to the next caption`, card, () => page.keyboard.press("Tab"));
  if (screenshots) await card.screenshot({ path: `${screenshots}/${scheme}-card.png` });
  await page.keyboard.press("Escape");
  check(`${scheme}, Escape goes back to the map of the whole caption`, (await seenIn(card)).pixels === untouched.pixels);
  await page.keyboard.press("ArrowRight");
  await page.locator("nav a").first().focus();
  check(`${scheme}, Tab out of a card leaves nothing behind`, (await seenIn(card)).pixels === untouched.pixels);

  const shown = () => page.locator("#gallery .card:visible").evaluateAll((all) => all.map((one) => one.dataset.right));
  const all = await shown();
  for (const [label, value] of [["right ones", "true"], ["wrong ones", "false"]]) {
    await page.getByLabel(label).press("Space");
    const some = await shown();
    check(`${scheme}, filter: ${label} alone (${some.length} of ${all.length})`, some.length === all.filter((one) => one === value).length && some.every((one) => one === value));
  }
  await page.getByLabel("all", { exact: true }).click();
  check(`${scheme}, filter: all again`, (await shown()).length === all.length);

  await words(page.locator(".card.words").first()).nth(1).hover();
  await page.waitForTimeout(300); // the button's colour has faded in
  await findings(page, scheme);
  await shot(scheme);
  await close();
}

/** On a phone: taps, and nothing to scroll sideways. */
async function onAPhone(scheme) {
  const { page, shot, close } = await open(`phone, ${scheme}`, { ...PHONE, colorScheme: scheme, reducedMotion: "reduce" });
  check(`phone, ${scheme}: no sideways scroll`, (await wide(page)) <= 0, `${await wide(page)} pixels too wide`);
  await firstScreen(page, `phone, ${scheme}`);
  for (const [kind, name] of [[".card.words", "image to text"], [".card.query", "text to image"]]) {
    const card = page.locator(kind).first();
    await moves(`phone, ${scheme}, tap, ${name}`, card, () => words(card).nth(1).tap());
    await moves(`phone, ${scheme}, tap, ${name}, next word`, card, () => words(card).nth(2).tap());
  }
  await page.getByLabel("wrong ones").tap();
  check(`phone, ${scheme}, tap: the filter leaves wrong ones`, (await page.locator("#gallery .card[data-right='true']:visible").count()) === 0 && (await page.locator("#gallery .card:visible").count()) > 0);
  await page.getByLabel("all", { exact: true }).tap();
  check(`phone, ${scheme}: no motion where it is not wanted`, await page.evaluate(() => getComputedStyle(document.querySelector(".text button")).transitionProperty === "none"));
  await shot(`phone-${scheme}-card`, false);
  await findings(page, `phone, ${scheme}`);
  await page.setViewportSize({ width: 320, height: 640 });
  check(`phone, ${scheme}: no sideways scroll at 320 pixels`, (await wide(page)) <= 0, `${await wide(page)} pixels too wide`);
  await page.setViewportSize(PHONE.viewport);
  await shot(`phone-${scheme}`);
  await close();
}

/** The page to try a checkpoint: a picture of the gallery, one's own, words, what is wrong. */
async function tried(kind, options, touch) {
  const { page, shot, close } = await open(kind, options, served, "#offered button");
  const press = (node) => (touch ? node.tap() : node.click()), answer = page.locator("#answer .result");
  await press(page.locator("#go"));
  check(`${kind}: without a picture it says so`, (await page.locator("#said").textContent()).startsWith("Drop a picture"));
  await press(page.locator("#offered button").first());
  await answer.waitFor();
  check(`${kind}: scores, captions and pictures`, /matching [\d.]+, contrast/.test(await answer.textContent()) && (await page.locator("ol li").count()) === 5 && (await page.locator(".near li").count()) === 5);
  const map = () => answer.evaluate((node) => ({ pixels: node.querySelector("canvas").toDataURL(), said: node.querySelector(".where").textContent }));
  const before = await map();
  await (touch ? words(answer).nth(1).tap() : words(answer).nth(1).hover());
  const word = await map();
  check(`${kind}: a word moves the map`, before.pixels !== word.pixels && before.said !== word.said, word.said);
  if (!touch) {
    await words(answer).nth(1).focus();
    await page.keyboard.press("ArrowRight");
    check(`${kind}, arrow key: the next word`, (await map()).said !== word.said);
  }
  await page.locator("#file").setInputFiles("data/page/images/test/000003.png");
  await page.locator("#text").fill("a kitten above a blue ring");
  await page.locator("#text").press("Enter");
  await page.locator("#answer .badge.wrong").waitFor();
  check(`${kind}: a word that the model lacks is named`, (await page.locator("#answer .badge.wrong").textContent()).startsWith("kitten is not among the words"));
  check(`${kind}: the picture of one's own is chosen`, (await page.locator("#chosen").textContent()) === "000003.png");
  check(`${kind}: no sideways scroll`, (await wide(page)) <= 0, `${await wide(page)} pixels too wide`);
  await findings(page, kind);
  await shot(kind.replace(/[^a-z]+/g, "-"));
  await page.locator("#file").setInputFiles({ name: '<img src=x onerror="alert(1)">.png', mimeType: "image/png", buffer: Buffer.from("no picture") });
  await page.waitForFunction(() => document.getElementById("said").className === "wrong");
  check(`${kind}: what is no picture is refused, and its name is text`, (await page.locator("#said").textContent()).includes("cannot be read as a picture") && (await page.locator("#chosen img").count()) === 0);
  await close(["Failed to load resource"]);
}

/** The page of one step: source, values, what is compared at a patch, the steps of the run. */
async function stepped(kind, options, touch) {
  const { page, shot, close } = await open(kind, options, trace, "#f-MAMO-forward .vals b");
  const press = (node) => (touch ? node.tap() : node.click());
  const [patch, word] = [0, 1].map((place) => page.locator("#f-MAMO-loss-mrm [aria-live]").nth(place));
  const told = () => patch.textContent(), first = await told();
  await press(page.locator("#f-MAMO-loss-mrm .patches button").nth(7));
  check(`${kind}: another patch, other numbers`, (await told()) !== first && (await told()).includes("mean squared"));
  const one = await word.textContent();
  await press(page.locator("#f-MAMO-loss-mrm button.word").nth(1));
  check(`${kind}: another word, other numbers`, (await word.textContent()) !== one);
  check(`${kind}: the target's source is a link to its function`, (await page.locator("#f-MAMO-loss-mrm .panel a").first().getAttribute("href")) === "#f-MAMO-teach" && (await page.locator("#f-MAMO-teach").count()) === 1);
  const total = () => page.locator("main strong").first().textContent(), last = await total();
  await page.locator("#step").focus();
  await page.keyboard.press("ArrowLeft");
  check(`${kind}, arrow key: an earlier step`, (await total()) !== last);
  const early = await total();
  await press(page.getByLabel("MRM alone"));
  check(`${kind}: another run`, (await total()) !== early);
  check(`${kind}: no sideways scroll`, (await wide(page)) <= 0, `${await wide(page)} pixels too wide`);
  await findings(page, kind);
  await shot(kind.replace(/[^a-z]+/g, "-"), false);
  await close();
}

try {
  await tried("try, light", { ...DESK, colorScheme: "light" }, false);
  await tried("try, dark", { ...DESK, colorScheme: "dark" }, false);
  await tried("try, phone", { ...PHONE, colorScheme: "light" }, true);
  await stepped("trace, light", { ...DESK, colorScheme: "light" }, false);
  await stepped("trace, dark", { ...DESK, colorScheme: "dark" }, false);
  await stepped("trace, phone", { ...PHONE, colorScheme: "light" }, true);
  await atTheDesk("light");
  await atTheDesk("dark");
  await onAPhone("light");
  await onAPhone("dark");
} catch (error) {
  check("the page can be used to the end", false, error.message);
} finally {
  await browser.close();
}
console.log(failures ? `${failures} checks failed` : "all checks passed");
process.exit(failures ? 1 : 0);
