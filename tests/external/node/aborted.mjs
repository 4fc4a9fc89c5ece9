// Make calls and abort them. Argument: the proxy's URL.
// The upstream responds to `.../has-come` and `.../has-gone` once the call has come or gone.
// Prints one line: the JSON of {name: outcome}.

import { clientOf, report, settle } from "./common.mjs";

const fal = clientOf(process.argv[2]);

async function run() {
  const controller = new AbortController();
  const call = settle(fal.run("abort/run", { input: {}, abortSignal: controller.signal }));
  await fal.run("abort/run/has-come");
  controller.abort();
  const outcome = await call;
  await fal.run("abort/run/has-gone");
  return outcome;
}

async function stream() {
  const stream = await fal.stream("abort/the", { input: {} });
  await new Promise((resolve) => stream.on("data", resolve));
  stream.abort();
  const outcome = await settle(stream.done());
  await fal.run("abort/stream/has-gone");
  return outcome;
}

report({ run: await run(), stream: await stream() });
