// Look at the page of the account in a real browser, on a small screen, in the light and in the dark.
// Arguments: the page's URL, the path of Chromium. Prints one line: the JSON of what was seen.

import { chromium } from "playwright-core";
import { report } from "./common.mjs";

const [url, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const seen = { problems: [], requests: [] };
for (const colorScheme of ["light", "dark"]) {
  const page = await browser.newPage({ viewport: { width: 390, height: 700 }, colorScheme });
  page.on("pageerror", (error) => seen.problems.push(String(error)));
  page.on("console", (message) => seen.problems.push(message.text()));
  page.on("request", (request) => seen.requests.push(request.url()));
  await page.goto(url);
  seen[colorScheme] = await page.evaluate(() => {
    const luminance = (color) => {
      const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((part) => {
        const share = part / 255;
        return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const body = getComputedStyle(document.body);
    const back = luminance(body.backgroundColor);
    const contrast = (element) => {
      const front = luminance(getComputedStyle(element).color);
      return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    };
    return {
      fits: document.documentElement.scrollWidth <= innerWidth,
      contrast: Math.min(...[...document.querySelectorAll("p, a, td, th, h1")].map(contrast)),
      rows: [...document.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent)),
      bars: [...document.querySelectorAll(".bar")].map((bar) => Math.round(bar.getBoundingClientRect().width)),
      total: [...document.querySelectorAll("tfoot tr > *")].map((cell) => cell.textContent),
      dark: back < 0.2,
    };
  });
  await page.click("text=endpoint");
  seen[colorScheme].endpoints = await page.locator("tbody tr").count();
  await page.close();
}
await browser.close();
report(seen);
