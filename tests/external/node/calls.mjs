// Make every kind of call that @fal-ai/client has, all at once, through the proxy and to the sandbox.
// Arguments: the proxy's URL, that of a proxy whose key is wrong, and that of one with access rules.
// Prints one line: the JSON of {name: outcome}.

import { clientOf, report, settle } from "./common.mjs";

const [proxyUrl, wrongKeyUrl, rulesUrl] = process.argv.slice(2);
const fal = clientOf(proxyUrl);
const restricted = clientOf(rulesUrl);
const MODEL = "fal-ai/flux/dev";

// The URL that a real WebSocket would open. No server here has WebSockets, and neither has Node 20.
let openedSocket;
const socketUrl = new Promise((resolve) => (openedSocket = resolve));
globalThis.WebSocket = class {
  constructor(url) {
    openedSocket(url);
  }
};

/** Return an input that controls the sandbox. */
const input = (sandbox = {}) => ({ prompt: "a lighthouse", sandbox });

/** Subscribe, and return each change of the queue as well as the result. */
async function subscribe(id, options, sandbox) {
  const updates = [];
  const onQueueUpdate = ({ status, queue_position: position, logs }) => {
    const update = [status, position ?? null, ...(logs ?? []).map((line) => line.message)];
    if (JSON.stringify(update) !== JSON.stringify(updates.at(-1))) updates.push(update);
  };
  const result = await fal.subscribe(id, { input: input(sandbox), logs: true, pollInterval: 25, onQueueUpdate, ...options });
  return { updates, result };
}

/** Upload, and read the file back from the address that was returned. */
async function upload(blob) {
  const url = await fal.storage.upload(blob);
  const read = await fetch(url);
  const body = Buffer.from(await read.arrayBuffer());
  const sent = Buffer.from(await blob.arrayBuffer());
  return { url, type: read.headers.get("content-type"), size: body.length, same: body.equals(sent) };
}

const calls = {
  run: () => fal.run(MODEL, { input: input({ tag: "run" }) }),

  run_by_get: () => fal.run(MODEL, { method: "get", input: { prompt: "a lighthouse" } }),

  async first_answered() {
    const run = async (name, sandbox) => (await fal.run(MODEL, { input: input(sandbox) })) && name;
    const both = [run("a run of its usual length", {}), run("a run that takes no time", { think_s: 0 })];
    const ended = Promise.allSettled(both);
    const first = await Promise.race(both);
    await ended;
    return first;
  },

  subscribe_polling: () => subscribe(MODEL, { mode: "polling" }, { tag: "polling" }),

  subscribe_streaming: () => subscribe("workflows/fal-ai/some-flow/v2", { mode: "streaming" }, { tag: "streaming" }),

  subscribe_despite_errors: () => subscribe(MODEL, {}, { tag: "status", error: 500, at: "status", times: 1, think_s: 0 }),

  async queue() {
    const { request_id: requestId } = await fal.queue.submit(MODEL, { input: input({ tag: "queue" }), priority: "low" });
    const early = await settle(fal.queue.result(MODEL, { requestId }));
    const status = await fal.queue.status(MODEL, { requestId, logs: true });
    const stream = await fal.queue.streamStatus(MODEL, { requestId, logs: true });
    const steps = [];
    for await (const { status, logs } of stream) steps.push([status, ...(logs ?? []).map((line) => line.message)]);
    const done = await stream.done();
    const result = await fal.queue.result(MODEL, { requestId });
    return { requestId, early, status, steps, done, result };
  },

  async cancel() {
    const { request_id: requestId } = await fal.queue.submit(MODEL, { input: input() });
    return settle(fal.queue.cancel(MODEL, { requestId }));
  },

  async stream() {
    const text = "Grüße 🌊 日本語 👩‍🚀 Привет! ".repeat(300);
    const stream = await fal.stream("fal-ai/any-llm", { input: input({ tag: "stream", text }) });
    const lengths = [];
    let last = "";
    let grows = true;
    for await (const { output } of stream) {
      grows &&= output.startsWith(last);
      last = output;
      lengths.push(output.length);
    }
    const done = await stream.done();
    return { lengths, grows, whole: done.output === text, partial: done.partial };
  },

  async stream_refused() {
    const stream = await fal.stream("fal-ai/any-llm", { input: input({ error: 422 }) });
    return settle(stream.done());
  },

  upload: () => upload(new Blob([Buffer.from("ÿ\0 bytes 🌊".repeat(50))], { type: "image/webp" })),

  async realtime() {
    const connection = fal.realtime.connect("fal-ai/fast-lcm-diffusion", { onResult() {}, onError: openedSocket });
    connection.send({ prompt: "a lighthouse" });
    const url = String(await socketUrl);
    connection.close();
    return url;
  },

  invalid: () => fal.run(MODEL, { input: input({ error: 422 }) }),
  // Through the proxy with rules.
  async cancel_allowed() {
    const { request_id: requestId } = await restricted.queue.submit(MODEL, { input: input() });
    const cancelled = await settle(restricted.queue.cancel(MODEL, { requestId }));
    const result = await settle(restricted.queue.result(MODEL, { requestId }));
    return { cancelled, status: await restricted.queue.status(MODEL, { requestId }), result };
  },
  subscribe_allowed: () => restricted.subscribe(MODEL, { input: input({ think_s: 0 }) }),
  async stream_allowed() {
    const stream = await restricted.stream(MODEL, { input: input() });
    return stream.done();
  },
  run_closed: () => restricted.run("fal-ai/other", { input: input() }),
  submit_closed: () => restricted.queue.submit("fal-ai/other", { input: input() }),
  async stream_closed() {
    const stream = await restricted.stream("fal-ai/other", { input: input() });
    return settle(stream.done());
  },
  upload_closed: () => restricted.storage.upload(new Blob(["x"])),

  wrong_key: () => clientOf(wrongKeyUrl).run(MODEL, { input: input() }),
  result_refused: () => subscribe(MODEL, {}, { error: 500, at: "result", think_s: 0 }),
  unknown_job: () => fal.queue.status(MODEL, { requestId: "none" }),
};

// The SDK repeats these, and the second try succeeds ...
for (const error of [429, 502, 503, 504]) {
  const sandbox = { tag: String(error), error, times: 1, think_s: 0 };
  calls[`run_${error}`] = () => fal.run(MODEL, { input: input(sandbox) });
  calls[`submit_${error}`] = () => fal.queue.submit(MODEL, { input: input({ ...sandbox, tag: `submit ${error}` }) });
}
// ... and does not repeat this.
calls.run_500 = () => fal.run(MODEL, { input: input({ tag: "500", error: 500, times: 1 }) });

const outcomes = await Promise.all(Object.entries(calls).map(async ([name, call]) => [name, await settle(call())]));
// Over 90 MiB the SDK sends parts of 10 MiB, one after the other. They would delay the other calls, so they come last.
const large = new Blob(["not all zero", new Uint8Array(200e6)]);
report({ ...Object.fromEntries(outcomes), upload_in_parts: await settle(upload(large)) });
