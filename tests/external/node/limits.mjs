// Use the sandbox's page behind limits in a real browser: what is left, and a refusal.
// Arguments: the page's URL, the path of Chromium. Prints one line: the JSON of what was shown after each call.

import { chromium } from "playwright-core";
import { report } from "./common.mjs";

const [url, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage();
await page.goto(url);
const left = [];
const errors = [];
for (let call = 0; call < 3; call++) {
  await page.evaluate(() => document.getElementById("stream-form").removeAttribute("aria-busy"));
  await page.click("#stream");
  await page.waitForSelector("#stream-form[aria-busy=false]");
  left.push(await page.textContent("#left"));
  errors.push(await page.textContent("#error"));
}
await browser.close();
report({ left, errors });
