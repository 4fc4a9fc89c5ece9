// What the scripts share: a client that goes through the proxy, and outcomes as JSON.

import { ApiError, createFalClient } from "@fal-ai/client";

/** fal's client with the proxy at that URL. Its own credentials are wrong, so that no call succeeds by them. */
export const callerOf = (url) =>
  createFalClient({ proxyUrl: { url, when: "always" }, credentials: "of-the-caller:and-wrong" });

/** What became of a promise: its value, or what the client tells of the error. */
export async function settle(promise) {
  try {
    return { value: await promise };
  } catch (error) {
    const { name, message, status, body, cause } = error;
    const fields = error.fieldErrors?.map(({ loc, msg }) => [loc, msg]);
    return { error: { name, message, status, body, fields, api: error instanceof ApiError, cause: cause && String(cause) } };
  }
}

/** Print the outcome, and end although timers of the client's and kept connections would go on. */
export function report(outcome) {
  process.stdout.write(JSON.stringify(outcome) + "\n", () => process.exit());
}
