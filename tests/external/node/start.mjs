// Draw a picture on the page of docs/start.md. Arguments: the page's URL, the path of Chromium.
// Prints one line: the JSON of the texts that were shown, the picture's width, and the calls that the page made.

import { chromium } from "playwright-core";

import { report } from "./common.mjs";

const [url, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
const calls = [];
page.on("request", (request) => calls.push(`${request.method()} ${new URL(request.url()).pathname}`));
await page.goto(url);
await page.evaluate(() => {
  window.shown = [];
  const status = document.querySelector("#status");
  new MutationObserver(() => window.shown.push(status.textContent)).observe(status, { childList: true });
});
await page.getByRole("button", { name: "Draw" }).click();
await page.waitForFunction(() => document.querySelector("#picture").naturalWidth, null, { timeout: 20_000 });
const outcome = await page.evaluate(() => [window.shown, document.querySelector("#picture").naturalWidth]);
await browser.close();
report({ shown: outcome[0], width: outcome[1], calls });
