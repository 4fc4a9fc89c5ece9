// Use the sandbox's page behind limits in a real browser: what is left, and refusals.
// Arguments: the page's URL, the path of Chromium. Prints one line: the JSON of what was shown after each call.

// The calls: a form, and the error that is chosen in the list.
const CALLS = [["stream", ""], ["stream", "500"], ["run", ""], ["run", "422"], ["run", ""], ["stream", ""]];

import { chromium } from "playwright-core";
import { report } from "./common.mjs";

const [url, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage();
await page.goto(url);
const left = [];
const errors = [];
for (const [form, error] of CALLS) {
  await page.selectOption("#scenario", error);
  await page.evaluate((form) => document.getElementById(`${form}-form`).removeAttribute("aria-busy"), form);
  await page.click(`#${form}`);
  await page.waitForSelector(`#${form}-form[aria-busy=false]`);
  left.push(await page.textContent("#left"));
  errors.push(await page.textContent("#error"));
}
await browser.close();
report({ left, errors });
