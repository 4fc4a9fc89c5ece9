// Build examples/vite-react, serve it with Vite, whose server.proxy leads to BACKEND, and use it in a real browser.
// Arguments: the folder of the example, the path of Chromium. Prints one line: the JSON of what was shown.

import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import { report } from "./common.mjs";

const [root, executablePath] = process.argv.slice(2);
const { build, preview } = await import(createRequire(`${root}/package.json`).resolve("vite"));
await build({ root, logLevel: "warn" });
const server = await preview({ root, logLevel: "warn", preview: { host: "127.0.0.1", port: 0 } });
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage();
const problems = [];
page.on("pageerror", (error) => problems.push(String(error)));
const left = [];

// From now on, every text that the page shows is kept, by its form and role.
await page.addInitScript(() => {
  window.shown = {};
  const note = () => {
    for (const element of document.querySelectorAll("form [role], form output")) {
      const texts = (window.shown[`${element.closest("form").id} ${element.role ?? "output"}`] ??= []);
      if (element.textContent && element.textContent !== texts.at(-1)) texts.push(element.textContent);
    }
  };
  new MutationObserver(note).observe(document, { childList: true, characterData: true, subtree: true });
});

/** Call the proxy as the page could, beside its forms, and return the status. */
const call = (endpoint, input) =>
  page.evaluate(async ([endpoint, input]) => {
    const headers = { "content-type": "application/json", "x-fal-target-url": `https://fal.run/${endpoint}` };
    return (await fetch("/api/fal/proxy", { method: "POST", headers, body: JSON.stringify(input) })).status;
  }, [endpoint, input]);

/** Submit the form, do that meanwhile, wait until its call is over, and return all that the form has shown since. */
async function use(form, meanwhile = async () => {}) {
  await page.evaluate(() => (window.shown = {}));
  await page.click(`#${form} button:not([type])`);
  await meanwhile();
  await page.waitForSelector(`#${form}[aria-busy=false]`);
  left.push(await page.textContent("#left"));
  return page.evaluate(() => window.shown);
}

async function login(password) {
  await page.fill("#login [name=user]", "ann");
  await page.fill("#login [name=password]", password);
  await page.click("#login button");
}

await page.goto(server.resolvedUrls.local[0]);
await login("wrong");
const wrong = await page.textContent("#login [role=alert]:not(:empty)");
const signedOut = await call("fal-ai/flux/dev", {});
await login("lighthouse");
await page.waitForSelector("#draw");
const drawn = await use("draw");
await page.waitForFunction(() => document.querySelector("#draw img")?.naturalWidth > 0);
const four = await call("fal-ai/flux/dev", { num_images: 4 });
const other = await call("fal-ai/flux/schnell", {});
const cancelled = await use("draw", async () => {
  await page.waitForFunction(() => document.querySelector("#draw [role=status]").textContent.includes("in the queue"));
  await page.click("#draw button[type=button]");
});
await page.setInputFiles("#describe [name=file]", { name: "a.png", mimeType: "image/png", buffer: Buffer.from("PNG") });
const described = await use("describe");
await call("fal-ai/flux/dev", { num_images: 3 });
const refused = await use("draw");
await page.reload();
const reloaded = await page.textContent("p");
await browser.close();
report({ wrong, signedOut, drawn, four, other, cancelled, described, refused, reloaded, left, problems });
