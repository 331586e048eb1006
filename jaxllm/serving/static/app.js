// A chat over this server's own API: nothing is fetched from elsewhere, nothing is kept but the settings.

const element = (id) => document.getElementById(id);
const settings = element("settings");
const NUMBERS = ["temperature", "top_p", "top_k", "max_completion_tokens", "seed"];
const CACHE_USE = /^jaxllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)$/m; // of /metrics, 0 to 1
const LOOK_EVERY = 1000; // milliseconds, while an answer is coming
const KEPT = "jaxllm.settings"; // all but the key, which lasts as long as the tab
const KEY = "jaxllm.key";
let conversation = []; // [{role, content}]
let running = null; // the AbortController of the answer that is coming

function headers() {
  const key = settings.elements.key.value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  } catch {} // somebody else's
  for (const [name, value] of Object.entries(kept)) {
    if (name !== "key" && settings.elements[name]) settings.elements[name].value = value;
  }
  settings.elements.key.value = sessionStorage.getItem(KEY) ?? "";
}

function keep() {
  const values = Object.fromEntries(new FormData(settings));
  sessionStorage.setItem(KEY, values.key);
  delete values.key;
  localStorage.setItem(KEPT, JSON.stringify(values));
}

async function loadModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) {
    showSettings(true);
    settings.elements.key.focus();
    element("status").textContent = "This server wants an API key: see the settings.";
    return;
  }
  const { data } = await answer.json();
  settings.elements.model.replaceChildren(...data.map(({ id }) => new Option(id, id)));
  element("model").textContent = settings.elements.model.value;
  element("status").textContent = "";
  await showCache();
}

// How full the server's cache is, of everybody's requests.
async function showCache() {
  let use = null;
  try {
    const answer = await fetch("metrics", { headers: headers() });
    if (answer.ok) use = CACHE_USE.exec(await answer.text());
  } catch {} // gone for a moment
  element("cache").textContent = use ? `cache ${(100 * Number(use[1])).toFixed(1)} %` : "";
}

function request() {
  const system = settings.elements.system.value.trim();
  const body = {
    model: settings.elements.model.value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) {
    const value = settings.elements[name].value;
    if (value !== "") body[name] = Number(value);
  }
  return body;
}

// The JSON of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// Text with ``` blocks set apart. Only text nodes are made, so that nothing in an answer is taken for markup.
function render(target, text) {
  const parts = text.split(/^```[^\n]*\n?/m).map((part, index) => {
    if (index % 2 === 0) return document.createTextNode(part);
    const code = document.createElement("code");
    code.textContent = part.replace(/\n$/, "");
    return code;
  });
  target.replaceChildren(...parts);
}

function addMessage(role, text = "") {
  const made = document.createElement("div");
  made.className = `message ${role}`;
  const thought = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Reasoning";
  const thoughtText = document.createElement("div");
  thought.append(summary, thoughtText);
  thought.hidden = true;
  const body = document.createElement("div");
  body.className = "text";
  const figures = document.createElement("div");
  figures.className = "figures";
  made.append(thought, body, figures);
  render(body, text);
  element("messages").append(made);
  made.scrollIntoView({ block: "end" });
  return { made, thought, thoughtText, body, figures };
}

function atEnd() {
  const list = element("messages");
  return list.scrollHeight - list.scrollTop - list.clientHeight < 80;
}

async function answer() {
  const view = addMessage("assistant");
  const begin = performance.now();
  let [text, reasoning, first, tokens, reused, stopped] = ["", "", 0, 0, "", false];
  let drawn = false;
  const draw = () => {
    drawn = false;
    const follow = atEnd();
    render(view.body, text);
    view.thought.hidden = !reasoning;
    view.thoughtText.textContent = reasoning;
    if (follow) view.made.scrollIntoView({ block: "end" });
  };
  const figures = () => {
    const now = performance.now();
    const speed = tokens > 1 && now > first ? `, ${(((tokens - 1) * 1000) / (now - first)).toFixed(1)} tokens/s` : "";
    const wait = first ? `, first after ${((first - begin) / 1000).toFixed(2)} s` : "";
    view.figures.textContent = `${tokens} tokens${speed}${wait}${reused}${stopped ? ", stopped" : ""}`;
  };
  running = new AbortController();
  setRunning(true);
  const looking = setInterval(showCache, LOOK_EVERY);
  try {
    const options = { method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal };
    const response = await fetch("v1/chat/completions", options);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) {
        tokens = event.usage.completion_tokens;
        const cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
        reused = `, ${cached} of ${event.usage.prompt_tokens} prompt tokens from the cache`;
      }
      const delta = event.choices[0]?.delta ?? {};
      if (delta.content || delta.reasoning) {
        first ||= performance.now();
        tokens += 1; // until the usage says exactly how many
        text += delta.content ?? "";
        reasoning += delta.reasoning ?? "";
        if (!drawn) {
          drawn = true;
          requestAnimationFrame(draw);
        }
      }
      figures();
    }
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) {
      const line = document.createElement("div");
      line.className = "error";
      line.textContent = error.message;
      view.made.append(line);
    }
  } finally {
    clearInterval(looking);
    draw();
    figures();
    running = null;
    setRunning(false);
    showCache();
  }
  if (text) conversation.push({ role: "assistant", content: text });
  else if (!reasoning) conversation.pop(); // what was asked can be asked again
}

function setRunning(on) {
  element("stop").hidden = !on;
  element("send").hidden = on;
}

function showSettings(on) {
  settings.hidden = !on;
  element("open-settings").setAttribute("aria-expanded", String(on));
}

element("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = element("input");
  const text = input.value.trim();
  if (!text || running) return;
  input.value = "";
  input.style.height = "";
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
});
element("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("compose").requestSubmit();
  }
});
element("input").addEventListener("input", ({ target }) => {
  target.style.height = "auto";
  target.style.height = `${target.scrollHeight}px`;
});
element("stop").addEventListener("click", () => running?.abort());
element("new").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  element("messages").replaceChildren();
  element("input").focus();
});
element("open-settings").addEventListener("click", () => showSettings(settings.hidden));
settings.addEventListener("submit", (event) => event.preventDefault());
settings.addEventListener("change", (event) => {
  keep();
  element("model").textContent = settings.elements.model.value;
  if (event.target.name === "key") loadModels();
});

restore();
loadModels().catch((error) => (element("status").textContent = error.message));
