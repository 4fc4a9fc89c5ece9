// Make calls whose responses break off, or come byte by byte. Argument: the proxy's URL.
// Prints one line: the JSON of {name: outcome}.

import { clientOf, report, settle } from "./common.mjs";

const fal = clientOf(process.argv[2]);
const stream = async (id) => settle((await fal.stream(id, { input: {} })).done());

report({
  result: await settle(fal.queue.result("broken/result", { requestId: "1" })),
  broken: await stream("broken/text"),
  torn: await stream("torn/text"),
});
