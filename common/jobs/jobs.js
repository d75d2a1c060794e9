// The jobs: a list, one of them as it goes on, a new one.
const FIELDS = [  // name, label, whether a text, methods that have it
  ["name", "Name", true, "distill sft kd dpo"], ["teacher", "Teacher", true, "distill"], ["student", "Student", true, "distill sft kd dpo"],
  ["data", "Data file", true, "distill sft kd dpo"], ["eval_data", "Held-out data file", true, "distill sft kd dpo"], ["dataset", "or data set", true, "distill"],
  ["subset", "Subset of the data set", true, "distill"], ["epochs", "Epochs", false, "distill sft kd dpo"], ["max_steps", "Steps", false, "distill sft kd dpo"],
  ["per_device_train_batch_size", "Rows at a time", false, "distill sft kd dpo"],
  ["gradient_accumulation_steps", "Times accumulated", false, "distill sft kd dpo"],
  ["learning_rate", "Learning rate", false, "distill sft kd dpo"], ["lora_r", "LoRA rank (0: all weights)", false, "distill sft kd dpo"],
  ["temperature", "Temperature", false, "distill"], ["forward_kl", "Weight of the KL divergence", false, "distill"],
  ["teacher_ce", "Weight of the teacher's argmax", false, "distill"], ["beta", "Beta", false, "dpo"]];
const PICKED = {teacher: "models", student: "models", data: "data-files", eval_data: "data-files"}, LOG_LINES = 1000;
let chosen = null, stream = null, pages = 1, choices = {models: [], data: [], defaults: {}, exports: [], serve_url: null};

function isOver(job) { return ["succeeded", "failed", "cancelled"].includes(job.state); }

function duration(seconds) {
  if (seconds < 60) return Math.round(seconds) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}

function size(bytes) {
  const unit = bytes < 1e3 ? 0 : Math.min(3, Math.floor(Math.log10(bytes) / 3));
  return (bytes / 1000 ** unit).toFixed(unit ? 1 : 0) + " " + ["B", "kB", "MB", "GB"][unit];
}

function tag(job) {
  const kind = job.state === "failed" ? "tag failed" : job.state === "succeeded" || job.state === "running" ? "tag on" : "tag";
  return element("span", {class: kind}, job.cancelling ? "stopping" : job.pausing ? "pausing" : job.state);
}

function bar(progress) {
  const fill = element("div", {class: "fill"});
  fill.style.width = progress.percent + "%";
  return element("div", {class: "track", role: "progressbar", "aria-valuenow": progress.percent, "aria-label": "Progress"}, fill);
}

function fact(job) {
  const progress = job.progress;
  if (job.ahead !== null) return job.ahead ? job.ahead + " before it" : "next";
  if (!progress) return "";
  if (isOver(job)) return progress.step + " steps";
  return progress.percent + "\u00a0%" + (progress.seconds_left === null ? "" : ", " + duration(progress.seconds_left) + " left");
}

function row(job) {
  const asked = job.request, teacher = asked.teacher || asked.teacher_model, student = asked.student || asked.student_model;
  const what = (job.name ? job.job_id + ", " : "") + job.method + ": " + (teacher ? shortName(teacher) + " → " : "") + shortName(student) + ", " +
    shortName(asked.data || asked.dataset);
  const about = element("span", {class: "what"}, what, ...(job.state === "running" && job.progress ? [bar(job.progress)] : []));
  const link = element("a", {href: "#job-" + job.job_id}, element("span", {class: "name"}, job.name || job.job_id), tag(job), about,
    element("span", {class: "fact"}, fact(job)));
  if (job.job_id === chosen) link.setAttribute("aria-current", "true");
  return element("li", {}, link);
}

async function refresh() {
  try {
    const jobs = [];
    let next = null;
    for (let page = 0; page < pages; page++) {
      const {answer} = await ask("jobs?limit=25" + (next === null ? "" : "&before=" + next));
      jobs.push(...answer.jobs);
      next = answer.next;
      if (next === null) break;
    }
    const focused = document.activeElement && document.activeElement.getAttribute("href");
    $("jobs").replaceChildren(...jobs.map(row));
    if (focused && focused.startsWith("#job-")) $("jobs").querySelector(`a[href="${focused}"]`)?.focus();
    $("none").hidden = jobs.length > 0;
    $("more").hidden = next === null;
    const count = state => jobs.filter(job => job.state === state).length;
    $("status").textContent = count("running") + " running, " + count("queued") + " waiting"
      + (next === null ? ", " + jobs.length + " in all" : "");
  } catch (error) { $("status").textContent = error.message; }
}

// One job: what it is, its curves, its log, its files.

function pair(name, value) { return element("div", {}, element("dt", {}, name), element("dd", {}, value)); }

function clock(stamp) { return stamp.slice(0, 19).replace("T", " "); }

function showState(job) {
  if (!job) return closeJob();
  const facts = [pair("State", tag(job)), pair("Method", job.method), pair("Submitted", clock(job.created))];
  if (job.started) facts.push(pair("Started", clock(job.started)));
  if (job.ended) facts.push(pair("Ended", clock(job.ended)));
  if (job.progress) facts.push(pair("Step", job.progress.step + " of " + job.progress.total));
  if (job.command && job.command.of > 1) facts.push(pair("Command " + job.command.number + " of " + job.command.of, job.command.name));
  if (fact(job) && !isOver(job)) facts.push(pair("Progress", fact(job)));
  for (const [name, value] of Object.entries(job.losses)) facts.push(pair(name.replaceAll("_", " "), number(value)));
  $("detail-title").textContent = "Job " + (job.name ? job.name + " (" + job.job_id + ")" : job.job_id);
  $("about").replaceChildren(element("dl", {class: "facts"}, ...facts), ...tried(job), ...evaluated(job), ...(job.progress && !isOver(job) ? [bar(job.progress)] : []),
    ...(job.error ? [errorBox({message: job.error.reason})] : []));
  const actions = [];
  if (!isOver(job)) actions.push(action("Cancel", "cancel/", "POST"));
  if (!isOver(job) && job.state !== "paused" && !job.pausing && !job.cancelling) actions.push(action("Pause", "pause/", "POST"));
  if (job.resumable) actions.push(action("Resume", "resume/", "POST"));
  if (isOver(job)) actions.push(action("Delete", "jobs/", "DELETE"));
  const names = buttons => buttons.map(button => button.dataset.asks).join(" ");
  // the same buttons stay: one that is drawn anew loses the focus, and a click that was half done
  if (names(actions) !== names([...$("actions").querySelectorAll("button")])) $("actions").replaceChildren(...actions);
  $("request").textContent = JSON.stringify(job.request, null, 2);
  if (isOver(job)) showFiles(job.job_id);
  refresh();
}

function action(name, path, method) {
  const button = element("button", {type: "button", class: "plain", "data-asks": path + chosen}, name);
  button.addEventListener("click", async () => {
    if (method === "DELETE" && !confirm("Delete the job and its files?")) return;
    button.disabled = true;
    try {
      await ask(path + chosen, {method});
      if (method === "DELETE") location.hash = "list";
      else if (name === "Resume") openJob(chosen);
    } catch (error) {
      button.disabled = false;
      $("actions").append(errorBox(error));
    }
    refresh();
  });
  return button;
}

function showLog(lines) {
  const log = $("log"), atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
  const all = (log.textContent ? log.textContent.split("\n") : []).concat(lines);
  log.textContent = all.slice(-LOG_LINES).join("\n");
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// Where a model can be tried that the inference server has got.
function tried(job) {
  if (!job.served_as) return [];
  const words = "Try this model: " + job.served_as;
  return [element("p", {}, choices.serve_url === null ? "Served by the inference server as " + job.served_as + "."
    : element("a", {class: "try", href: choices.serve_url + "#run=" + job.served_as}, words))];
}

// The figures that evaluators have kept with the run of a job.
let opened = false;
function evaluated(job) {
  if (!job.evaluations.length) return [];
  const shown = figures(job.evaluations);
  shown.open = opened;
  shown.addEventListener("toggle", () => { opened = shown.open; });
  return [element("h3", {}, "Figures"), shown];
}

async function showFiles(job) {
  try {
    const {answer} = await ask("artifacts/" + job);
    if (job !== chosen || !answer.artifacts.length) return;
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...["File", "Size", "SHA-256"].map(title =>
      element("th", {scope: "col", class: title === "Size" ? "number" : ""}, title)))), element("tbody", {}, ...answer.artifacts.map(file => element("tr", {},
      element("td", {}, download(file)), element("td", {class: "number"}, size(file.bytes)),
      element("td", {class: "code", title: file.sha256}, file.sha256.slice(0, 16))))));
    $("files").replaceChildren(element("h3", {}, "Files"), element("div", {class: "scroll"}, table));
  } catch (error) { $("files").replaceChildren(errorBox(error)); }
}

function download(file) {  // a link cannot carry the key
  const link = element("a", {href: file.url, download: file.path.split("/").pop()}, file.path);
  link.addEventListener("click", async event => {
    if (!$("key").value) return;
    event.preventDefault();
    try {
      const content = URL.createObjectURL(await (await send(file.url)).blob());
      element("a", {href: content, download: link.download}).click();
      setTimeout(() => URL.revokeObjectURL(content), 60000);
    } catch (error) { $("files").append(errorBox(error)); }
  });
  return link;
}

function closeJob() {
  if (stream) stream.abort();
  stream = chosen = null;
  $("detail").hidden = true;
}

async function openJob(job) {
  closeJob();
  chosen = job;
  points = [];
  for (const id of ["about", "actions", "panes", "files", "log"]) $(id).replaceChildren();
  $("curves").hidden = true;
  $("detail-title").textContent = "Job " + job;
  $("detail").hidden = false;
  stream = new AbortController();
  const mine = stream;
  let last = "", fresh = true;
  while (stream === mine) {
    try {
      const ended = await follow(job, mine, last, event => {
        last = event.id || last;
        if (event.event === "log") showLog(event.data);
        if (event.event === "metrics") { points.push(...event.data); showCurves(); }
        if (event.event === "state") showState(event.data);
        if (fresh) { fresh = false; $("detail").scrollIntoView(); $("detail-title").focus({preventScroll: true}); }
      });
      if (ended) return;
    } catch (error) {
      if (stream !== mine) return;
      if (error.param) { $("about").replaceChildren(errorBox(error)); return; }  // no such job
      $("status").textContent = error.message;
    }
    await new Promise(resolve => setTimeout(resolve, 2000));  // the server went away: go on where it was
  }
}

// True when the stream came to its end.
async function follow(job, mine, last, take) {
  let over = false;
  for await (const event of serverEvents(await send("events/" + job, {signal: mine.signal, headers: last ? {"Last-Event-ID": last} : {}}))) {
    if (stream !== mine) return true;
    event.data = JSON.parse(event.data);
    over = event.event === "state" && (!event.data || isOver(event.data));
    take(event);
  }
  return stream !== mine || over;
}

// A new job.

function showFields() {
  const method = $("method").value, kept = Object.fromEntries(FIELDS.map(([name]) => [name, $(name)?.value || ""]));
  const focused = document.activeElement?.id, known = choices.defaults[method] || {};
  $("fields").replaceChildren(...FIELDS.filter(([, , , methods]) => methods.split(" ").includes(method)).map(([name, label, isText]) => {
    const input = element("input", isText ? {id: name, type: "text", autocomplete: "off", spellcheck: "false"}
      : {id: name, type: "number", step: "any", inputmode: "decimal"});
    if (PICKED[name]) input.setAttribute("list", PICKED[name]);
    input.value = kept[name] || "";
    return element("div", {}, element("label", {for: name}, label,
      ...(name in known ? [" ", element("span", {class: "default"}, "default " + known[name])] : [])), input);
  }));
  if (focused && FIELDS.some(([name]) => name === focused)) $(focused)?.focus();
}

function checked() { return [...$("formats").querySelectorAll(":checked")].map(box => box.value); }

async function showChoices() {
  try { choices = (await ask("choices")).answer; } catch (error) { return; }  // the list of jobs says what is wrong
  $("models").replaceChildren(...choices.models.map(path => element("option", {value: path})));
  $("data-files").replaceChildren(...choices.data.map(file => element("option", {value: file.path, label: size(file.bytes)})));
  const kept = checked();
  $("formats").replaceChildren(...choices.exports.map(format => element("label", {},
    Object.assign(element("input", {type: "checkbox", value: format}), {checked: kept.includes(format)}), format)));
  showFields();
}

onSubmit($("new").querySelector("form"), async () => {
  for (const field of $("new").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  try {
    const body = {method: $("method").value};
    for (const [name, , isText] of FIELDS) {
      const value = $(name)?.value.trim();
      if (value) body[name] = isText ? value : Number(value);
    }
    if (checked().length) body.exports = checked();
    let further;
    try { further = JSON.parse($("settings").value.trim() || "{}"); } catch (error) {
      throw Object.assign(new Error("The further settings are not JSON: " + error.message), {param: "settings"});
    }
    const {answer} = await ask("distill", {body: {...body, ...further}});
    $("answer").replaceChildren();
    location.hash = "job-" + answer.job_id;
  } catch (error) {
    const field = error.param && $(error.param);
    if (field) { field.setAttribute("aria-invalid", "true"); field.focus(); }
    $("answer").replaceChildren(errorBox(error));
  }
});

async function upload() {
  const file = $("upload").files[0];
  if (!file) return;
  const form = new FormData();
  form.append("file", file);
  $("sent").textContent = "sending " + file.name + ", " + size(file.size) + " …";
  try {
    const {answer} = await ask("files", {raw: form, method: "POST"});
    $("data").value = answer.id;
    $("sent").textContent = answer.filename + ": " + (answer.rows === null ? "text" : answer.rows + " rows") +
      ", kept as " + answer.id;
  } catch (error) { $("sent").replaceChildren(errorBox(error)); }
  $("upload").value = "";
}

function followHash() {
  const found = /^#job-([0-9a-f]{16})$/.exec(location.hash);
  if (found) openJob(found[1]); else if (location.hash === "#list" || !location.hash) closeJob();
}

$("method").addEventListener("change", showFields);
$("log-scale").addEventListener("change", showCurves);
addEventListener("resize", showCurves);
$("upload").addEventListener("change", upload);
$("more").addEventListener("click", () => { pages++; refresh(); });
$("key").addEventListener("change", () => { refresh(); showChoices(); followHash(); });
$("key-form").addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", followHash);
showFields();
showChoices();
refresh();
followHash();
setInterval(() => { if (!document.hidden) refresh(); }, 2000);
