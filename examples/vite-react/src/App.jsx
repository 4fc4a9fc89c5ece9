import { useEffect, useState } from "react";
import { fal, onLeft, reason } from "./fal.js";

const PICTURES = "fal-ai/flux/dev";
const VISION = "fal-ai/any-llm/vision";

export function App() {
  const [user, setUser] = useState(); // undefined: not known yet; null: nobody
  const [left, setLeft] = useState("");
  useEffect(() => {
    onLeft(setLeft);
    fetch("/api/login").then((response) => response.json()).then(({ user }) => setUser(user));
  }, []);
  if (user === undefined) return null;
  if (user === null) return <Login onLogin={setUser} />;
  return (
    <>
      <p>Signed in as {user}. <span id="left" role="status">{left && `${left} left today`}</span></p>
      <Draw />
      <Describe />
    </>
  );
}

function Login({ onLogin }) {
  const [error, setError] = useState("");

  async function login(event) {
    event.preventDefault();
    const response = await fetch("/api/login", { method: "POST", body: new URLSearchParams(new FormData(event.target)) });
    if (response.ok) onLogin((await response.json()).user);
    else setError("Wrong name or password.");
  }

  return (
    <form id="login" onSubmit={login}>
      <label>Name <input name="user" autoComplete="username" required /></label>
      <label>Password <input name="password" type="password" autoComplete="current-password" required /></label>
      <button>Sign in</button>
      <p role="alert">{error}</p>
    </form>
  );
}

/** Draw a picture through fal's queue, with progress, until it is there or the user cancels. */
function Draw() {
  const [progress, setProgress] = useState("");
  const [job, setJob] = useState(null); // while it can be cancelled
  const [picture, setPicture] = useState(null);
  const [error, setError] = useState("");

  async function draw(event) {
    event.preventDefault();
    const prompt = new FormData(event.target).get("prompt");
    const stop = new AbortController();
    setPicture(null);
    setError("");
    setProgress("Submitting …");
    try {
      const { data } = await fal.subscribe(PICTURES, {
        input: { prompt },
        logs: true,
        abortSignal: stop.signal,
        onEnqueue: (requestId) => setJob({ requestId, stop }),
        onQueueUpdate: ({ status, queue_position: ahead, logs }) =>
          setProgress(status === "IN_QUEUE" ? `${ahead} ahead in the queue` : logs?.at(-1)?.message ?? status),
      });
      setPicture({ src: data.images[0].url, alt: prompt });
    } catch (failure) {
      setError(stop.signal.aborted ? "Cancelled." : reason(failure));
    } finally {
      setProgress("");
      setJob(null);
    }
  }

  /** Cancel the job itself: fal's queue would finish it although nobody waits, and bill it. */
  async function cancel() {
    try {
      await fal.queue.cancel(PICTURES, { requestId: job.requestId });
      job.stop.abort();
    } catch (failure) {
      setError(reason(failure)); // too late, mostly
    }
  }

  return (
    <form id="draw" aria-busy={progress !== ""} onSubmit={draw}>
      <h2>Draw a picture</h2>
      <label>Prompt <input name="prompt" defaultValue="A lighthouse in a snow storm" required /></label>
      <button disabled={progress !== ""}>Draw</button>
      <button type="button" disabled={!job} onClick={cancel}>Cancel</button>
      <p role="status">{progress}</p>
      <p role="alert">{error}</p>
      {picture && <img {...picture} />}
    </form>
  );
}

/** Upload a picture to fal, and show what a model says about it, word by word. */
function Describe() {
  const [busy, setBusy] = useState(false);
  const [text, setText] = useState("");
  const [error, setError] = useState("");

  async function describe(event) {
    event.preventDefault();
    const file = new FormData(event.target).get("file");
    setBusy(true);
    setText("");
    setError("");
    try {
      const image_url = await fal.storage.upload(file);
      const input = { prompt: "Describe this picture.", image_url };
      // "server" sends the stream through the proxy; the client's other way needs a token in the browser.
      const stream = await fal.stream(VISION, { input, connectionMode: "server" });
      for await (const { output } of stream) setText(output);
      await stream.done();
    } catch (failure) {
      setError(reason(failure));
    } finally {
      setBusy(false);
    }
  }

  return (
    <form id="describe" aria-busy={busy} onSubmit={describe}>
      <h2>Describe a picture</h2>
      <label>Picture <input name="file" type="file" accept="image/*" required /></label>
      <button disabled={busy}>Describe</button>
      <output>{text}</output>
      <p role="alert">{error}</p>
    </form>
  );
}
