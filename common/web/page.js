// What the servers' pages share; common/web/app.py puts it into them.
const $ = id => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The response to a request with the key of this page; throws what the server says is wrong.
// `body` is sent as JSON, `raw` as it is and as of this `kind`.
async function send(path, {body, raw, kind, method = body ? "POST" : "GET", headers = {}, signal} = {}) {
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  if (body || kind) headers["Content-Type"] = kind || "application/json";
  let response;
  try {
    response = await fetch(path, {method, headers, signal, body: raw || body && JSON.stringify(body)});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    const error = answer.error || {message: "The server answered " + response.status + "."};
    const thrown = new Error(error.message + (error.request_id ? " (request " + error.request_id + ")" : ""));
    throw Object.assign(thrown, {param: error.param, status: response.status});
  }
  return response;
}

async function ask(path, options) {
  const started = performance.now();
  const response = await send(path, options);
  const answer = response.status === 204 ? null : await response.json().catch(() => ({}));
  return {answer, milliseconds: performance.now() - started};
}

// {event, id, data (text)} of each server-sent event, as they come: EventSource cannot send the key.
async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const event = Object.fromEntries(text.slice(0, end).split("\n").filter(line => !line.startsWith(":")).map(line =>
        [line.slice(0, line.indexOf(": ")), line.slice(line.indexOf(": ") + 2)]));
      if (event.data !== undefined) yield event;
    }
  }
}

function shortName(path) { return String(path || "").split("/").filter(Boolean).slice(-2).join("/"); }

function errorBox(error) {
  return element("p", {class: "error", role: "alert"}, error.message);
}

// A line that shows how long something takes, with a button that stops it.
function progress(target, words) {
  const control = new AbortController(), started = performance.now();
  const text = element("span", {}), stop = element("button", {type: "button", class: "plain small"}, "Stop");
  const line = element("p", {class: "running", "aria-live": "off"}, text, " ", stop);
  const seconds = () => (performance.now() - started) / 1000;
  const show = () => { text.textContent = words + " · " + seconds().toFixed(1) + " s"; };
  const timer = setInterval(show, 100);
  stop.addEventListener("click", () => control.abort());
  show();
  target.append(line);
  return {signal: control.signal, seconds, say(more) { words = more; show(); }, end() { clearInterval(timer); line.remove(); }};
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea", {});  // by an address without TLS there is no clipboard for scripts
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

// A text with a button that copies it.
function withCopy(shown) {
  const button = element("button", {type: "button", class: "plain small"}, "Copy");
  button.addEventListener("click", async () => {
    try { await copy(shown.textContent); button.textContent = "Copied"; } catch (error) { button.textContent = "Cannot copy"; }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return element("div", {class: "copied"}, shown, button);
}

// A button that saves what `content()` gives as a file.
function saveButton(title, name, kind, content) {
  const button = element("button", {type: "button", class: "plain small"}, title);
  button.addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([content()], {type: kind}));
    element("a", {href: address, download: name}).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  });
  return button;
}

// What evaluators kept with a run: the newest in a line, all of them with data, date and intervals when it is opened.
const HEADLINES = ["accuracy", "macro_f1", "schema_valid_rate", "field_f1", "exact_match", "pass_at_1", "f1", "perplexity"];
function figures(evaluations) {
  if (!evaluations || !evaluations.length) return "–";
  const named = evaluation => {
    const known = HEADLINES.filter(name => name in evaluation.figures);
    return known.length ? known : Object.keys(evaluation.figures).slice(0, 3);
  };
  const shown = (evaluation, name) => {
    const {value, low, high} = evaluation.figures[name];
    return value.toFixed(3) + (low === undefined || high === undefined ? "" : " [" + low.toFixed(3) + ", " + high.toFixed(3) + "]");
  };
  const line = named(evaluations[0]).slice(0, 2).map(name => name.replaceAll("_", " ") + " " + shown(evaluations[0], name)).join(", ");
  const facts = evaluation => [
    ["Of", evaluation.n.toLocaleString("en") + " rows, " + evaluation.split + (evaluation.data ? " of " + evaluation.data : "")],
    ...(evaluation.created ? [["Made", evaluation.created.replace("T", " ").replace("Z", "")]] : []),
    ...(evaluation.calibration ? [["Calibration", evaluation.calibration]] : []),
    ...(evaluation.contamination ? [["Seen in training", evaluation.contamination.rows + " of " + evaluation.contamination.of]] : []),
    ...Object.keys(evaluation.figures).map(name => [name.replaceAll("_", " "), shown(evaluation, name)]),
    ...(evaluation.data_sha256 ? [["SHA-256", evaluation.data_sha256.slice(0, 16)]] : []),
    ...(evaluation.command ? [["Command", evaluation.command]] : [])];
  return element("details", {class: "figures"}, element("summary", {}, line || evaluations[0].evaluator), ...evaluations.map(evaluation =>
    element("dl", {}, ...facts(evaluation).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]))));
}

function onSubmit(form, run) {
  const section = form.closest("section"), button = form.querySelector("button:not([type])");
  form.addEventListener("submit", async event => {
    event.preventDefault();
    if (button.disabled) return;
    button.disabled = true;
    section.setAttribute("aria-busy", "true");
    try { await run(); } finally {
      button.disabled = false;
      section.removeAttribute("aria-busy");
      refresh();
    }
  });
  form.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}
