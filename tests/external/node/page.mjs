// Use the sandbox's page in a real browser: both forms, errors, Cancel.
// Arguments: the page's URL, the path of Chromium. Prints one line: the JSON of all that was shown.

import { chromium } from "playwright-core";
import { report } from "./common.mjs";
import { look } from "./look.mjs";

const [url, executablePath] = process.argv.slice(2);
const OFFLINE = ["--disable-quic", "--no-first-run", "--disable-sync"];
OFFLINE.push("--disable-background-networking", "--disable-component-update");

/** Prompts with everything that means something to a shell, to Python or to JavaScript. */
const ODD = `It's "$HOME" \`id\` \\n \${1} $(id) {'a': "b"} <b> #1 🐱`;

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", ...OFFLINE] });
const page = await browser.newPage({ viewport: { width: 500, height: 500 } }); // a small screen
const origins = new Set();
const problems = [];
page.on("request", (request) => origins.add(new URL(request.url()).origin));
page.on("pageerror", (error) => problems.push(String(error)));
await page.goto(url);

// From now on, every text that an output shows is recorded, in order.
await page.evaluate(() => {
  for (const output of document.querySelectorAll("output")) {
    const record = () => (window.shown[output.id] ??= []).push(output.value);
    new MutationObserver(record).observe(output, { childList: true, characterData: true, subtree: true });
  }
});

/** Start that form's call, act as a user does meanwhile, wait for the end, and return all that was shown. */
async function use(form, meanwhile = async () => {}, start = () => page.click(`#${form}`)) {
  const focus = [];
  const note = async () => focus.push(await page.evaluate(() => document.activeElement.id));
  await page.evaluate((form) => {
    window.shown = {};
    document.getElementById(form).removeAttribute("aria-busy");
  }, `${form}-form`);
  await start();
  await note();
  await meanwhile();
  await note();
  await page.waitForSelector(`#${form}-form[aria-busy=false]`);
  await note();
  return page.evaluate(([form, focus]) => {
    const ids = ["picture", "run", "stream", `${form}-cancel`];
    const [picture, run, stream, cancel] = ids.map((id) => document.getElementById(id));
    const error = document.getElementById("error");
    const { top, bottom } = error.getBoundingClientRect();
    const idle = ({ disabled, ariaDisabled }) => !disabled && ariaDisabled !== "true";
    return {
      ...window.shown,
      error: error.textContent,
      error_form: error.closest("form")?.id,
      error_in_sight: top >= 0 && bottom <= innerHeight && bottom > top,
      focus,
      picture: picture.hidden ? null : [picture.naturalWidth, picture.naturalHeight, picture.alt],
      idle: idle(run) && idle(stream) && cancel.disabled,
    };
  }, [form, focus]);
}

/** Return an action that cancels as soon as that output shows that text. */
const cancel = (form, output, text) => async () => {
  await page.waitForFunction(([id, text]) => document.getElementById(id).value.includes(text), [output, text]);
  await page.click(`#${form}-cancel`);
};

/** Press Enter on a button that has the focus, and once more while its call runs. */
const enter = (form) => async () => {
  await page.focus(`#${form}`);
  await page.keyboard.press("Enter");
};

const seen = { run: await use("run"), stream: await use("stream") };
seen.run_cancelled = await use("run", cancel("run", "queue-position", "In the queue"));
seen.stream_cancelled = await use("stream", cancel("stream", "stream-output", "Gr"));
for (const error of ["422", "429", "500"]) {
  await page.selectOption("#scenario", error);
  seen[`run_${error}`] = await use("run");
  seen[`stream_${error}`] = await use("stream");
}
await page.selectOption("#scenario", "");
let submits = 0;
page.on("request", (request) => (submits += /^https:..queue[^?]+dev$/.test(request.headers()["x-fal-target-url"])));
seen.run_by_enter = { ...(await use("run", enter("run"), enter("run"))), executions: submits };
await page.fill("#prompt", "Cancelled at once");
seen.run_cancelled_at_once = await use("run", () => page.evaluate(() => document.getElementById("run-cancel").click()));
await page.fill("#prompt", "Ein Kätzchen 🐱");
seen.run_again = await use("run");
await page.selectOption("#scenario", "500");
seen.stream_after_picture = await use("stream");
const left = await page.locator("#left").isHidden();

// The code of each form's call, which the test runs.
await page.selectOption("#scenario", "");
await page.fill("#prompt", `${ODD}\nand a second line`);
seen.odd_run = await use("run");
await page.fill("#stream-prompt", ODD);
seen.odd_stream = await use("stream", async () => {}, () => page.press("#stream-prompt", "Enter"));
const code = await page.evaluate(() =>
  ["run", "stream"].map((form) =>
    [...document.querySelectorAll(`#${form}-code .code`)].map((block) => [
      block.querySelector("span").textContent,
      block.querySelector("pre").textContent,
    ]),
  ),
);
const found = [];
await page.click("#run-code summary");
await page.click("#stream-code summary");
for (const colorScheme of ["light", "dark"]) {
  await page.emulateMedia({ colorScheme });
  for (const width of [390, 1200]) {
    await page.setViewportSize({ width, height: 844 });
    found.push(...(await look(page, `${colorScheme}, ${width} pixels`)));
  }
}
await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
const copied = [];
await page.click("text=Copy >> nth=0");
await page.waitForSelector("text=Copied");
copied.push(await page.evaluate(() => navigator.clipboard.readText()));
await page.evaluate(() => Object.defineProperty(navigator, "clipboard", { value: undefined })); // as on a phone without TLS
await page.click("[aria-label='Copy curl'] >> nth=1");
copied.push(await page.evaluate(() => String(getSelection())));

// The connection fails: before a call, and behind its first bytes.
await page.context().setOffline(true);
seen.run_offline = await use("run");
seen.stream_offline = await use("stream");
await page.context().setOffline(false);
await page.evaluate(() => {
  const broken = { start: (it) => it.enqueue(new Uint8Array(1)), pull: (it) => it.error(new TypeError("network error")) };
  window.fetch = async () => new Response(new ReadableStream(broken));
});
seen.run_cut = await use("run");
seen.stream_cut = await use("stream");
await browser.close();
report({ seen, origins: [...origins], problems, left, code, found, copied });
