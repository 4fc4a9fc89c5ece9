// Shared by the scripts: fal's client behind the proxy, and outcomes as JSON.

import { ApiError, createFalClient } from "@fal-ai/client";

/** Return fal's client with the proxy at that URL. Its own credentials are wrong, and no call may succeed by them. */
export const clientOf = (url) =>
  createFalClient({ proxyUrl: { url, when: "always" }, credentials: "of-the-client:and-wrong" });

/** Return the outcome of a promise: its value, or the facts of its error. */
export async function settle(promise) {
  try {
    return { value: await promise };
  } catch (error) {
    const { name, message, status, body, cause } = error;
    const fields = error.fieldErrors?.map(({ loc, msg }) => [loc, msg]);
    return { error: { name, message, status, body, fields, api: error instanceof ApiError, cause: cause && String(cause) } };
  }
}

/** Print the outcome, and exit although timers and kept connections of the client would go on. */
export function report(outcome) {
  process.stdout.write(JSON.stringify(outcome) + "\n", () => process.exit());
}
