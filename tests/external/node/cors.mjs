// Call the proxy from pages of other origins in a real browser: one origin is allowed and one is not.
// Arguments: the proxy's URL, both pages' URLs, the path of Chromium. Prints one line: the JSON of each page's outcome.

import { chromium } from "playwright-core";
import { report } from "./common.mjs";

const [proxyUrl, allowedUrl, otherUrl, executablePath] = process.argv.slice(2);
const OFFLINE = ["--disable-quic", "--no-first-run", "--disable-sync"];
OFFLINE.push("--disable-background-networking", "--disable-component-update");

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", ...OFFLINE] });

/** Return what a script of that page can read of a response, and of one to a refused call. */
async function calls(url) {
  const page = await browser.newPage();
  await page.goto(url);
  return page.evaluate(async (proxyUrl) => {
    const call = async (target, more = {}) => {
      try {
        const response = await fetch(proxyUrl, {
          method: "POST",
          headers: { "content-type": "application/json", "x-fal-target-url": target, "x-app-fal-a": "1", ...more },
          body: JSON.stringify({ prompt: "a lighthouse", sandbox: { think_s: 0 } }),
        });
        const { status, headers } = response;
        const names = ["x-fal-request-id", "server", "content-type"];
        return { status, body: await response.json(), headers: Object.fromEntries(names.map((n) => [n, headers.get(n)])) };
      } catch (error) {
        return { error: String(error) };
      }
    };
    const run = await call("https://fal.run/fal-ai/flux/dev", { authorization: "Key of-the-page" });
    return { run, refused: await call("https://evil.example/") };
  }, proxyUrl);
}

const outcome = { allowed: await calls(allowedUrl), other: await calls(otherUrl) };
await browser.close();
report(outcome);
