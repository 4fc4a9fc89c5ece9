// The official Hono handler on Hono's server for Node. Arguments: PORT.
import { createRouteHandler } from "@fal-ai/server-proxy/hono";
import { createAdaptorServer } from "@hono/node-server";
import { Hono } from "hono";

const handler = createRouteHandler();
const app = new Hono().get("/api/fal/proxy", handler).post("/api/fal/proxy", handler);
createAdaptorServer({ fetch: app.fetch }).listen(Number(process.argv[2]), "127.0.0.1", 4096);
