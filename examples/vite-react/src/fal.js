// fal's own client, behind the proxy, and what the proxy tells of the limits.

import { fal } from "@fal-ai/client";

let showLeft = () => {};

/** Call `show` with a text such as "3 of 10" after each paid call. */
export function onLeft(show) {
  showLeft = show;
}

/** Read the fields that the proxy adds to responses to paid calls; undefined for all others. */
function leftToday(headers) {
  const number = (field, key) => headers.get(field)?.match(`"jobs-per-user-day"[^,]*;${key}=([0-9]+)`)?.[1];
  const left = number("RateLimit", "r");
  const quota = number("RateLimit-Policy", "q");
  return left && quota && `${left} of ${quota}`;
}

fal.config({
  proxyUrl: "/api/fal/proxy",
  fetch: async (...call) => {
    const response = await window.fetch(...call);
    const left = leftToday(response.headers);
    if (left) showLeft(left);
    return response;
  },
});

/** Say in words why a call failed: the proxy's message, or fal's detail. */
export function reason(error) {
  const { message, detail } = error.body ?? {};
  return message ?? (Array.isArray(detail) ? detail.map(({ msg }) => msg).join("; ") : detail) ?? error.message;
}

export { fal };
