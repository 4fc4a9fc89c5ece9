// Shared by the scripts that look at pages: what axe-core finds, what does not fit, and the contrast of borders.

import { readFileSync } from "node:fs";

const axe = readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");

/** Return what is wrong with the page as it is now, as texts, and how it looks. `name` is for the texts. */
export async function look(page, name) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  const found = violations.map(({ id, nodes }) => `${name}: ${id}: ${nodes.map(({ html }) => html.slice(0, 200)).join(" ")}`);
  const seen = await page.evaluate(() => {
    const luminance = (color) => {
      const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map((part) => {
        const share = part / 255;
        return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
      });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    /** Return the background that is behind an element. */
    const behind = (element) => {
      for (; element; element = element.parentElement) {
        const color = getComputedStyle(element).backgroundColor;
        if (!color.endsWith(", 0)")) return color;
      }
      return "rgb(255, 255, 255)";
    };
    const contrast = (element) => {
      const [one, other] = [getComputedStyle(element).borderTopColor, behind(element.parentElement)].map(luminance);
      return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    };
    const bordered = [...document.querySelectorAll("main *, header *")].filter(
      (element) => parseFloat(getComputedStyle(element).borderTopWidth) && element.checkVisibility(),
    );
    const wide = document.documentElement.scrollWidth > innerWidth;
    const pale = bordered.filter((element) => contrast(element) < 3).map((element) => element.outerHTML.slice(0, 80));
    return { wide, pale, dark: luminance(behind(document.body)) < 0.2, borders: bordered.length };
  });
  if (seen.wide) found.push(`${name}: wider than the screen`);
  found.push(...seen.pale.map((html) => `${name}: the border has a contrast below 3: ${html}`));
  if (seen.dark !== name.startsWith("dark") || !seen.borders) found.push(`${name}: not the page that was asked for`);
  return found;
}
