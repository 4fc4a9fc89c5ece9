// Call fal's own proxy for Node with fetch in place of a network, and print what it does, as one line of JSON.
// Arguments: patterns and endpoints, as JSON.

import { handleRequest, isAllowedEndpoint, resolveProxyConfig } from "@fal-ai/server-proxy";
import { createHandler } from "@fal-ai/server-proxy/express";
import { createRouteHandler } from "@fal-ai/server-proxy/hono";

import { report } from "./common.mjs";

const [patterns, endpoints] = process.argv.slice(2).map((text) => JSON.parse(text));
const RUN = "https://fal.run/fal-ai/flux/dev";
console.warn = () => {};

let sent; // the arguments of the last call of fetch
let response; // makes its result
globalThis.fetch = async (url, options) => {
  sent = { url, ...options };
  return response();
};
const fine = () => new Response("{}", { status: 422, headers: [["set-cookie", "a=1"], ["set-cookie", "b=2"]] });

/** Handle a request as Express's adapter does. Return what was sent to fal, or the status of a refusal. */
async function asked(headers, { method = "POST", ...config } = {}) {
  sent = undefined;
  response = fine;
  const all = { "x-fal-target-url": RUN, ...headers };
  const refused = await handleRequest(
    {
      id: "test",
      method,
      getHeaders: () => all,
      getHeader: (name) => all[name],
      getRequestBody: async () => "{}",
      sendHeader: () => {},
      respondWith: (status) => status,
      sendResponse: () => undefined,
    },
    config,
  );
  return sent ?? refused;
}

/** Handle a request with Express's adapter. Return the status and the headers of the response. */
async function express() {
  response = fine;
  const seen = { status: 200, headers: {} };
  const result = {
    setHeader: (name, value) => { seen.headers[name] = value; },
    status: (status) => { seen.status = status; return result; },
    write: () => {},
    end: () => {},
  };
  await createHandler()({ method: "POST", headers: { "x-fal-target-url": RUN }, body: {} }, result, () => {});
  return seen;
}

/** Handle a request with Hono's adapter. Return the headers that went to fal, and those of the response. */
async function hono() {
  response = () => new Response("{}", { headers: { "content-encoding": "gzip" } });
  const all = { "x-fal-target-url": RUN, "x-fal-queue-priority": "low" };
  const context = { req: { method: "POST", header: (name) => all[name], json: async () => ({}) }, json: () => {} };
  const got = await createRouteHandler()(context);
  return { sent: sent.headers, encoding: got.headers.get("content-encoding") };
}

const closed = { allowedEndpoints: ["fal-ai/other"] };
report({
  options: Object.keys(resolveProxyConfig({})),
  matches: patterns.map((pattern) => endpoints.map((endpoint) => isAllowedEndpoint(endpoint, [pattern]))),
  express: await express(),
  hono: await hono(),
  noUrl: await asked({ "x-fal-target-url": "nonsense" }).catch((error) => error.name),
  plain: await asked({ accept: "text/event-stream", "x-app-fal-a": "1", "x-fal-a": "1" }),
  authorization: (await asked({ authorization: "Bearer of-the-client" })).headers.authorization,
  clearText: (await asked({ "x-fal-target-url": "http://fal.run/fal-ai/flux/dev" })).url,
  posted: await asked({}, closed),
  got: (await asked({}, { method: "GET", ...closed })).url,
  everyone: (await asked({}, { allowUnauthorizedRequests: false })).url,
  token: await asked({ "x-fal-target-url": "https://rest.fal.ai/tokens/" }),
  upload: await asked({ "x-fal-target-url": "https://rest.fal.ai/storage/upload/initiate-multipart?storage_type=fal-cdn-v3" }),
});
