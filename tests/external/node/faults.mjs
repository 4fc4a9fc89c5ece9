// Make paid calls to an upstream that takes the job and then fails, each on a host (so on connections) of its own.
// Argument: the JSON of [{url, host, operation, reused}]. Prints one line: the JSON of {host: outcome}.

import { clientOf, report, settle } from "./common.mjs";

const input = { prompt: "a lighthouse" };

async function outcome({ url, host, operation, reused }) {
  const fal = clientOf(url);
  if (reused) await fal.run(`https://${host}/first`, { input });
  const pay = operation === "run" ? fal.run : fal.queue.submit;
  return [host, await settle(pay(`https://${host}/job`, { input }))];
}

report(Object.fromEntries(await Promise.all(JSON.parse(process.argv[2]).map(outcome))));
