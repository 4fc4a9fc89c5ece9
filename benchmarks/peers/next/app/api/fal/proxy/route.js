// The official handler for the app router of Next.js.
import { createRouteHandler } from "@fal-ai/server-proxy/nextjs";

export const { GET, POST } = createRouteHandler();
