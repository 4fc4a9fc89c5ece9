// The official Express handler, set up as in its README. Arguments: PORT.
import { createHandler, route } from "@fal-ai/server-proxy/express";
import express from "express";

const app = express();
app.use(express.json());
app.all(route, createHandler());
app.listen(Number(process.argv[2]), "127.0.0.1", 4096);
