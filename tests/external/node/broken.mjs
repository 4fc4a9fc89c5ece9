// Answers that break off, or come byte by byte. Argument: the proxy's URL.
// Prints one line: the JSON of {name: outcome}.

import { callerOf, report, settle } from "./common.mjs";

const fal = callerOf(process.argv[2]);
const stream = async (id) => settle((await fal.stream(id, { input: {} })).done());

report({
  result: await settle(fal.queue.result("broken/result", { requestId: "1" })),
  broken: await stream("broken/text"),
  torn: await stream("torn/text"),
});
