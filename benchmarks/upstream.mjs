// The stand-in for fal that every proxy of the benchmark relays to: TLS, HTTP/2 and HTTP/1.1, one process.
//
// Node, because it needs less CPU for a call than the cheapest Python relay and holds 20,000 of them. Every response
// depends on the request or is a pattern that the client can check. Commands arrive as lines on standard input, and the
// reply to each is one line of JSON: "stats" (which resets the counts), "release" (which responds to all held polls).
//
// Arguments: PORT CERTIFICATE KEY AUTHORIZATION

import { readFileSync } from "node:fs";
import http2 from "node:http2";
import { createInterface } from "node:readline";
import { gzipSync } from "node:zlib";

const [port, certificate, key, authorization] = process.argv.slice(2);

const RESPONSE_BYTES = 200;
const BLOCK_BYTES = 64 * 1024;
const BOMB_BYTES = 256 * 1024 * 1024;
// Streams on one HTTP/2 connection, as common front ends announce; without a limit all polls would share a connection.
const STREAMS_PER_CONNECTION = 100;

const connections = new Set();
const held = new Map(); // response: the function that finishes it
const counts = { calls: 0, opened: 0, refused: 0 };
let streams = 0;
let requestId = 0;
let bomb;

function head(extra) {
  return { "content-type": "application/json", "x-fal-request-id": `request-${++requestId}`, ...extra };
}

// Respond with the body of the request, in an object padded to RESPONSE_BYTES.
function respond(res, body, extra) {
  const start = `{"echo": ${body}, "padding": "`;
  const text = `${start.padEnd(RESPONSE_BYTES - 2, "x")}"}`;
  res.writeHead(200, head({ "content-length": RESPONSE_BYTES, ...extra }));
  res.end(text);
}

function readBody(req, then) {
  let body = "";
  req.on("data", (chunk) => (body += chunk));
  req.on("end", () => then(body || "null"));
}

// Write the blocks that `next` returns, until it returns null, no faster than the peer reads.
function pump(res, next) {
  const go = () => {
    for (;;) {
      const block = next();
      if (block === null) return res.end();
      if (!res.write(block)) return;
    }
  };
  res.on("drain", go);
  go();
}

function eventStream(req, res) {
  streams++;
  res.once("close", () => streams--);
  req.resume();
  res.writeHead(200, head({ "content-type": "text/event-stream", "cache-control": "no-cache" }));
}

const routes = {
  "/bench/short": (req, res) => readBody(req, (body) => respond(res, body)),

  // A run that is billed, and a queued job that never ends.
  "/bench/paid": (req, res) => readBody(req, (body) => respond(res, body, { "x-fal-billable-units": "1" })),
  "/bench/app/requests/1/status": (req, res) => readBody(req, () => respond(res, '{"status":"IN_PROGRESS"}')),

  "/bench/hold": (req, res, query) =>
    readBody(req, (body) => {
      const release = () => {
        clearTimeout(timer);
        held.delete(res);
        respond(res, body);
      };
      const timer = setTimeout(release, Number(query.get("s")) * 1000);
      held.set(res, release);
      res.once("close", () => {
        clearTimeout(timer);
        held.delete(res);
      });
    }),

  // Byte i of the body is (i / BLOCK_BYTES) modulo 251, so a client can check each piece by itself.
  "/bench/big": (req, res, query) => {
    req.resume();
    const size = Number(query.get("mb")) * 1_000_000;
    res.writeHead(200, head({ "content-type": "application/octet-stream", "content-length": size }));
    let sent = 0;
    pump(res, () => {
      if (sent >= size) return null;
      const block = Buffer.alloc(Math.min(BLOCK_BYTES, size - sent), (sent / BLOCK_BYTES) % 251);
      sent += block.length;
      return block;
    });
  },

  "/bench/bomb": (req, res) => {
    req.resume();
    bomb ??= gzipSync(Buffer.alloc(BOMB_BYTES, " "), { level: 9 });
    res.writeHead(200, head({ "content-encoding": "gzip", "content-length": bomb.length }));
    res.end(bomb);
  },

  "/bench/sse/idle": (req, res) => {
    eventStream(req, res);
    res.write('data: {"event": 0}\n\n');
  },

  "/bench/sse/endless": (req, res) => {
    eventStream(req, res);
    const events = Buffer.from(`data: {"text": "${"x".repeat(1000)}"}\n\n`.repeat(16));
    pump(res, () => events);
  },
};

const server = http2.createSecureServer({
  cert: readFileSync(certificate),
  key: readFileSync(key),
  allowHTTP1: true,
  settings: { maxConcurrentStreams: STREAMS_PER_CONNECTION },
});
server.keepAliveTimeout = 600_000; // to never close a connection just when a proxy reuses it
server.requestTimeout = 0;
server.on("secureConnection", (socket) => {
  counts.opened++;
  connections.add(socket);
  socket.setNoDelay(true);
  socket.once("close", () => connections.delete(socket));
});
server.on("sessionError", () => {});
server.on("tlsClientError", () => {});
server.on("request", (req, res) => {
  res.on("error", () => {});
  const mark = req.url.indexOf("?");
  const path = mark < 0 ? req.url : req.url.slice(0, mark);
  const route = routes[path];
  if (req.headers.authorization !== authorization || route === undefined) {
    counts.refused++;
    req.resume();
    res.writeHead(route ? 401 : 404, head());
    res.end("{}");
    return;
  }
  counts.calls++;
  route(req, res, mark < 0 ? undefined : new URLSearchParams(req.url.slice(mark)));
});

const commands = {
  stats: () => {
    const result = { ...counts, connections: connections.size, held: held.size, streams };
    counts.calls = counts.opened = counts.refused = 0;
    return result;
  },
  release: () => {
    const all = [...held.values()];
    for (const release of all) release();
    return { released: all.length };
  },
};
const lines = createInterface({ input: process.stdin });
lines.on("line", (line) => console.log(JSON.stringify(commands[line]())));
lines.on("close", () => process.exit());
server.listen({ port: Number(port), host: "127.0.0.1", backlog: 8192 }, () => {
  console.log(JSON.stringify({ port: server.address().port, node: process.version }));
});
