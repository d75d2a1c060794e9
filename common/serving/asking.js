// The tasks of the runs, the models, and which of both is asked.
const latencies = [];
let models = [], tried = null;
const PARTS = {documents: "idp", code: "codegen", chat: null};

function latency(milliseconds) {
  latencies.push(milliseconds);
  latencies.splice(0, latencies.length - 50);
  showStatus();
}

async function post(path, body) {
  const {answer, milliseconds} = await ask(path, {body});
  latency(milliseconds);
  return {answer, milliseconds};
}

function showStatus() {
  const loaded = models.filter(model => model.loaded).length;
  let text = loaded + " of " + models.length + " models loaded";
  if (latencies.length) {
    const sorted = [...latencies].sort((a, b) => a - b);
    const at = share => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))].toFixed(0);
    text += " · latency of " + sorted.length + " requests: median " + at(.5) + " ms, p95 " + at(.95) + " ms";
  }
  if ($("status").textContent !== text) $("status").textContent = text;
}

function isFor(model, kind) {
  return model.kind ? model.kind === kind : model.name.toLowerCase().includes(kind === "codegen" ? "code" : kind);
}

// What a run was trained for, as a value of the picker.
function taskOf(model) {
  if (model.kind === "labels") return "labels:" + model.task;
  for (const [part, kind] of Object.entries(PARTS)) if (kind && isFor(model, kind)) return part;
  return model.kind ? "chat" : "labels:" + ownTask;
}

function showTasks(found) {
  const usable = found.models.filter(model => model.kind === "labels" && model.current && !model.error);
  ownTask = found.task;
  labelTasks = new Map([[found.task, found.labels], ...usable.map(model => [model.task, model.labels])]);
  const names = [...labelTasks.keys()];
  if ($("task").dataset.names !== names.join()) {
    const before = $("task").value;
    $("task").dataset.names = names.join();
    $("task").replaceChildren(...names.map(name => element("option", {value: "labels:" + name}, "Labels: " + name)),
      element("option", {value: "documents"}, "Documents: fields as JSON"), element("option", {value: "code"}, "Code"),
      element("option", {value: "chat"}, "Chat"));
    $("task").value = before;
    if ($("task").selectedIndex < 0) $("task").selectedIndex = 0;
  }
}

function showPart() {
  const part = $("task").value.startsWith("labels:") ? "labels" : $("task").value;
  for (const id of ["labels", ...Object.keys(PARTS)]) $(id).hidden = id !== part;
  showLabelTask();
}

function showModels(found) {
  models = found.models;
  showTasks(found);
  const usable = models.filter(model => model.current && !model.error);
  const asked = new URLSearchParams(location.hash.slice(1)).get("run");
  const wanted = asked !== tried && usable.find(model => model.name === asked);
  if (wanted) { tried = asked; $("task").value = taskOf(wanted); }
  showPart();
  $("bases").textContent = "Base: " + found.base_model + ". In memory: " + (found.bases.join(", ") || "none yet") + ".";
  showRegistry();
  const task = labelTask(), names = task + ": " + usable.map(model => model.name + " " + model.task).join();
  if ($("compare").dataset.names !== names || wanted) {
    $("compare").dataset.names = names;
    $("compare").replaceChildren(...usable.filter(model => ranks(model, task)).map(model => {
      const box = element("input", {type: "checkbox", value: model.name});
      box.checked = wanted ? model.name === wanted.name : !isFor(model, "idp") && !isFor(model, "codegen");
      return element("label", {}, box, model.name);
    }));
    for (const [part, kind] of Object.entries(PARTS)) {
      const own = kind && usable.some(model => isFor(model, kind)) ? "the newest for this task" : "the base";
      const before = $(part + "-run").value;
      $(part + "-run").replaceChildren(element("option", {value: ""}, "Default: " + own),
        ...usable.map(model => element("option", {value: model.name}, model.name)));
      $(part + "-run").value = wanted ? wanted.name : before;
      if ($(part + "-run").selectedIndex < 0) $(part + "-run").selectedIndex = 0;
    }
  }
  showStatus();
}

function showRegistry() {
  const key = JSON.stringify(models);
  if ($("registry").dataset.key === key) return;  // what is open stays open
  $("registry").dataset.key = key;
  $("registry").replaceChildren(...models.map(model => element("tr", {},
    element("th", {scope: "row"}, model.current && !model.error ? element("a", {href: "#run=" + model.name}, model.name) : model.address),
    element("td", {class: "short"}, element("span", {class: model.loaded ? "tag on" : "tag"},
      model.error ? "unusable" : model.loaded ? "loaded" : "on disk"), model.error ? " " + model.error : ""),
    element("td", {class: "short"}, model.task || "–"), element("td", {}, figures(model.evaluations)),
    element("td", {class: "short"}, model.method || "–"), element("td", {title: model.base}, shortName(model.base) || "–"),
    element("td", {class: "short"}, model.created ? model.created.replace("T", " ").replace("Z", "") : "–"),
    element("td", {class: "code"}, model.adapter_sha256 ? model.adapter_sha256.slice(0, 12) : "–"))));
}

$("task").addEventListener("change", () => { history.replaceState(null, "", "#ask"); tried = null; refresh(); showPart(); });

async function refresh() {
  try {
    showModels((await ask("models")).answer);
  } catch (error) {
    $("status").textContent = error.message;
  }
}

addEventListener("hashchange", () => {
  tried = null;
  if (location.hash.startsWith("#run=")) refresh().then(() => $("ask").scrollIntoView());
});
$("key").addEventListener("change", refresh);
$("key-form").addEventListener("submit", event => event.preventDefault());
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 5000);
