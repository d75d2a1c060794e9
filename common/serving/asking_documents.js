// Documents to JSON: one, with the place of each field in its text, or several files as a table.

// The leaves of a value by their paths, as the server names them.
function leaves(value, path = "") {
  if (value === null || typeof value !== "object") return {[path || "$"]: value};
  const parts = Array.isArray(value) ? value.map((item, i) => [path + "[" + i + "]", item])
    : Object.entries(value).map(([name, item]) => [path ? path + "." + name : name, item]);
  return Object.assign({}, ...parts.map(([name, item]) => leaves(item, name)));
}

function surety(share) {
  if (share === undefined) return element("td", {}, "–");
  const fill = element("div", {class: "fill"});
  fill.style.width = 100 * share + "%";
  return element("td", {class: "sure"}, (100 * share).toFixed(1) + "\u00a0%", element("div", {class: "track", "aria-hidden": "true"}, fill));
}

// The fields beside the document, in which the text of each is marked; both light up together.
function grounded(answer) {
  const characters = Array.from(answer.document);  // evidence counts code points
  const found = Object.entries(answer.evidence || {});
  const values = leaves(answer.fields ?? null), sure = answer.confidence || {};
  const places = found.filter(([, each]) => each.found);
  const cuts = [...new Set([0, characters.length, ...places.flatMap(([, each]) => [each.start, each.end])])].sort((a, b) => a - b);
  const text = element("pre", {tabindex: "0", role: "region", "aria-label": "Document"});
  const marks = [];
  cuts.slice(0, -1).forEach((start, number) => {
    const part = characters.slice(start, cuts[number + 1]).join("");
    const names = places.filter(([, each]) => each.start <= start && start < each.end).map(([name]) => name);
    if (!names.length) return text.append(part);
    const mark = element("mark", {title: names.join(", ")}, part);
    marks.push({mark, names});
    text.append(mark);
  });
  const nowhere = Object.keys(values).filter(name => !(answer.evidence || {})[name]).map(name => [name, {found: false, match: "–"}]);
  const rows = [...found, ...nowhere].map(([name, each]) => {
    const row = element("tr", {tabindex: "0"}, element("th", {scope: "row"}, name),
      element("td", {}, String(values[name] ?? answer.written[name] ?? "")), surety(sure[name]),
      element("td", {}, String(answer.written[name] ?? "")), element("td", {}, each.found || each.match === "–" ? each.match : "not found"));
    const own = marks.filter(({names}) => names.includes(name)).map(({mark}) => mark);
    const light = on => [row, ...own].forEach(part => part.classList.toggle("on", on));
    const show = () => {
      light(true);
      if (own.length) text.scrollTop += own[0].getBoundingClientRect().top - text.getBoundingClientRect().top - text.clientHeight / 3;
    };
    for (const [start, end] of [["mouseenter", "mouseleave"], ["focus", "blur"]]) {
      row.addEventListener(start, show);
      row.addEventListener(end, () => light(false));
    }
    for (const mark of own) {
      mark.addEventListener("mouseenter", () => light(true));
      mark.addEventListener("mouseleave", () => light(false));
    }
    return row;
  });
  const fields = element("table", {"aria-label": "Where the fields stand"}, element("thead", {}, element("tr", {},
    ...["Field", "Value", "Sure", "As written", "In the text"].map(title => element("th", {scope: "col"}, title)))), element("tbody", {}, ...rows));
  return element("div", {class: "grounded"},
    element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Fields of the document"}, fields), text);
}

function documentAnswer(answer, milliseconds) {
  const about = answer.model_name + ", " + milliseconds.toFixed(0) + " ms"
    + (answer.pieces > 1 ? ", read in " + answer.pieces + " pieces" : "") + (answer.cut ? "; cut: it had not ended, or a value ran on" : "");
  const shown = answer.error ? [errorBox(new Error("No valid answer: " + answer.error)), withCopy(element("pre",
    {tabindex: "0", role: "region", "aria-label": "What the model wrote"}, answer.text))]
    : [withCopy(element("pre", {tabindex: "0", role: "region", "aria-label": "Fields"}, JSON.stringify(answer.fields, null, 2))),
      ...(answer.evidence ? [grounded(answer)] : [])];
  return [...shown, ...[...new Set(answer.notes)].map(note => element("p", {class: "notice"}, note)), element("p", {class: "quiet"}, about)];
}

function schemaOf() {
  const text = $("schema").value.trim();
  if (!text) return undefined;
  try { return JSON.parse(text); } catch (error) { throw new Error("The schema is not JSON: " + error.message); }
}

async function extract(source, schema, signal) {
  const asked = {evidence: true, confidence: true, ...($("documents-run").value ? {run: $("documents-run").value} : {})};
  if (source instanceof File && /\.pdf$/i.test(source.name)) {
    const query = new URLSearchParams({...asked, ...(schema ? {schema: JSON.stringify(schema)} : {})});
    return ask("infer/idp/pdf?" + query, {raw: source, kind: "application/pdf", method: "POST", signal});
  }
  const document = source instanceof File ? await source.text() : source;
  return ask("infer/idp", {body: {...asked, document, ...(schema ? {schema} : {})}, signal});
}

onSubmit($("documents").querySelector("form"), async () => {
  const target = $("documents-answer"), files = [...$("files").files];
  target.replaceChildren();
  const running = progress(target, "reading");
  try {
    const schema = schemaOf();
    if (files.length < 2) {
      const {answer, milliseconds} = await extract(files[0] || $("document").value, schema, running.signal);
      latency(milliseconds);
      target.append(...documentAnswer(answer, milliseconds));
    } else await extractFiles(files, schema, running, target);
  } catch (error) {
    target.append(error.name === "AbortError" ? element("p", {}, "Stopped after " + running.seconds().toFixed(1) + " s.") : errorBox(error));
  } finally { running.end(); }
});

async function extractFiles(files, schema, running, target) {
  const rows = [], details = element("div", {});
  let stopped = null;
  for (const [number, file] of files.entries()) {
    running.say(file.name + ": " + (number + 1) + " of " + files.length);
    const row = {file: file.name};
    try {
      const {answer, milliseconds} = await extract(file, schema, running.signal);
      if (answer.error) row.error = answer.error;
      for (const [name, value] of Object.entries(answer.error ? {} : leaves(answer.fields))) {
        row[name] = value;
        if (answer.confidence?.[name] !== undefined) row[name + " sure"] = answer.confidence[name];
      }
      if (answer.notes.length) row.notes = answer.notes.join("; ");
      const show = element("button", {type: "button", class: "plain small"}, "Show");
      show.addEventListener("click", () => {
        details.replaceChildren(element("h3", {}, file.name), ...documentAnswer(answer, milliseconds));
        details.scrollIntoView({block: "nearest"});
      });
      row.view = show;
    } catch (error) {
      if (error.name === "AbortError") { stopped = error; break; }
      row.error = error.message;
    }
    rows.push(row);
  }
  const names = [...new Set(rows.flatMap(Object.keys))].filter(name => !["file", "view", "error", "notes"].includes(name));
  const more = ["error", "notes"].filter(name => rows.some(row => name in row));
  target.append(element("p", {}, (stopped ? "Stopped: " : "") + rows.length + " of " + files.length + " files in " + running.seconds().toFixed(1) + " s"));
  if (rows.length) target.append(results("documents", ["file", "view", ...names, ...more], rows, ["error", "notes"]), details);
}
