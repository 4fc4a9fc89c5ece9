import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// While you develop, Vite serves the page, and passes all of /api on to examples/embed_with_login.py. So the page and the
// proxy have one origin, as they have when the application serves the built page itself, and no CORS is needed.
export default defineConfig({
  plugins: [react()],
  server: { proxy: { "/api": process.env.BACKEND ?? "http://127.0.0.1:8000" } },
});
