// What the servers' pages share; common/web.py puts it into them.
const $ = id => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The response to a request with the key of this page; throws what the server says is wrong.
async function send(path, {body, method = body ? "POST" : "GET", headers = {}, signal} = {}) {
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const isForm = body instanceof FormData;  // whose boundary the browser names
  if (body && !isForm) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {method, headers, signal, body: body && !isForm ? JSON.stringify(body) : body});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    const error = answer.error || {message: "The server answered " + response.status + "."};
    const thrown = new Error(error.message + (error.request_id ? " (request " + error.request_id + ")" : ""));
    thrown.param = error.param;
    throw thrown;
  }
  return response;
}

async function ask(path, options) {
  const started = performance.now();
  const response = await send(path, options);
  const answer = response.status === 204 ? null : await response.json().catch(() => ({}));
  return {answer, milliseconds: performance.now() - started};
}

function errorBox(error) {
  return element("p", {class: "error", role: "alert"}, error.message);
}

function onSubmit(section, run) {
  const form = section.querySelector("form"), button = form.querySelector("button");
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
