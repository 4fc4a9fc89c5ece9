// Look at the state of the service in a real browser, on two screens, in the light and in the dark; let it refresh.
// Arguments: the page's URL, the path of Chromium. Prints one line: the JSON of what was seen.

import { chromium } from "playwright-core";
import { report } from "./common.mjs";
import { look } from "./look.mjs";

const [url, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const seen = { problems: [], found: [], requests: [] };

/** Return the texts of the page: what is above the tables, and the cells of each row. */
const texts = (page) => page.evaluate(() => ({
  attention: [...document.querySelectorAll("#attention li")].map((item) => item.textContent),
  rows: [...document.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent.trim())),
  scripts: document.scripts.length,
  stale: document.getElementById("stale").textContent,
}));

for (const colorScheme of ["light", "dark"]) {
  const page = await browser.newPage({ viewport: { width: 390, height: 700 }, colorScheme });
  page.on("pageerror", (error) => seen.problems.push(String(error)));
  page.on("console", (message) => seen.problems.push(message.text()));
  page.on("request", (request) => seen.requests.push(request.url()));
  await page.clock.install();
  await page.goto(url);
  seen.found.push(...(await look(page, `${colorScheme}, 390 pixels`)));
  await page.setViewportSize({ width: 1200, height: 800 });
  seen.found.push(...(await look(page, `${colorScheme}, 1200 pixels`)));
  seen.first ??= await texts(page);
  if (colorScheme === "light") {
    await page.close();
    continue;
  }
  const refresh = async () => {
    const response = page.waitForEvent("requestfinished");
    await page.clock.runFor(5000);
    await response;
    await page.waitForTimeout(50);
  };
  await page.focus("main a");
  await refresh();
  seen.refreshed = await texts(page);
  seen.focus = await page.evaluate(() => document.activeElement.getAttribute("href"));
  await page.click("#pause");
  const before = seen.requests.length;
  await page.clock.runFor(20000);
  seen.while_paused = seen.requests.length - before;
  await page.click("#pause");
  await page.context().setOffline(true);
  page.removeAllListeners("console"); // Chromium reports the request that fails
  await page.clock.runFor(5000);
  await page.waitForFunction(() => document.getElementById("stale").textContent);
  seen.offline = await texts(page);
  await page.context().setOffline(false);
  await page.clock.runFor(5000);
  await page.waitForFunction(() => !document.getElementById("stale").textContent);
}
await browser.close();
report(seen);
