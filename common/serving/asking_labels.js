// Rows to labels: one row by several models side by side, or the rows of a file.
const EXAMPLE = $("features").value, AT_ONCE = 64;
let labelTasks = new Map(), ownTask = "creditmix", table = null;

// Whether a model can be asked for a label set: its own, or any where it was trained for none.
function ranks(model, task) {
  return model.kind === "labels" ? model.task === task : model.name === "base" || !model.kind && task === ownTask;
}

function labelTask() { return $("task").value.replace(/^labels:/, ""); }

function showLabelTask() {
  const task = labelTask();
  if (!$("task").value.startsWith("labels:") || $("labels").dataset.task === task) return;
  $("labels").dataset.task = task;
  $("labels-title").textContent = task + ": " + labelTasks.get(task).join(", ");
  $("features").value = task === "creditmix" ? EXAMPLE : "";
  $("labels-answers").replaceChildren();
}

function bars(answer) {
  return element("ul", {class: "bars"}, ...Object.entries(answer.probabilities).map(([label, share]) => {
    const percent = (100 * share).toFixed(1) + "\u00a0%";
    const fill = element("div", {class: "fill"});
    fill.style.width = 100 * share + "%";
    return element("li", label === answer.prediction ? {class: "best"} : {}, element("span", {}, label),
      element("div", {class: "track", "aria-hidden": "true"}, fill), element("span", {}, percent));
  }));
}

function scoreTable(answer) {
  const columns = [["Raw", "raw_scores"], ["Prior", "prior"], ["Calibrated", "scores"]];
  const head = element("table", {}, element("thead", {}, element("tr", {}, element("th", {scope: "col"}, "Nats"),
    ...columns.map(([title]) => element("th", {scope: "col", class: "number"}, title)))));
  head.append(element("tbody", {}, ...Object.keys(answer.scores).map(label => element("tr", {},
    element("th", {scope: "row"}, label),
    ...columns.map(([, key]) => element("td", {class: "number"}, answer[key][label].toFixed(3)))))));
  return element("details", {}, element("summary", {}, "Scores"),
    element("p", {class: "quiet"}, "A nat measures how likely a label is on a scale of logarithms: one nat more is 2.7 times as likely. "
      + "Raw is how likely the label is after this text, prior how likely it is after no text at all; calibrated is what the text adds."),
    element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores"}, head));
}

// What a margin means, in words.
function margin(answer) {
  const [first, second] = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  const times = first[1] / second[1];
  const words = times > 1000 ? "more than a thousand times" : times < 1.05 ? "about" : times.toFixed(times < 10 ? 1 : 0) + " times";
  return "Margin " + answer.top2_margin.toFixed(2) + " nats: " + first[0] + " is " + words + " as likely as " + second[0];
}

function decided(answer) {
  const best = Math.max(...Object.values(answer.probabilities));
  return answer.prediction && answer.probabilities[answer.prediction] < best ? "; the fitted decision rule prefers " + answer.prediction : "";
}

function labelPath(name, batch) {
  const other = name === "base" && labelTask() !== ownTask ? "?task=" + encodeURIComponent(labelTask()) : "";
  return "infer/" + encodeURIComponent(name) + (batch ? "/batch" : "") + other;
}

async function classify(name, features, warnings) {
  const card = element("article", {class: "answer", "data-run": name, "aria-label": name});
  try {
    const {answer, milliseconds} = await post(labelPath(name), {features});
    if (answer.warning) warnings.add(answer.warning);
    card.append(element("header", {}, element("h3", {}, name),
        element("span", {class: "quiet"}, milliseconds.toFixed(0) + " ms")),
      element("p", {class: "prediction"}, answer.prediction || "no answer: not sure enough"), bars(answer),
      element("p", {class: "quiet"}, margin(answer) + decided(answer) + "."), scoreTable(answer));
  } catch (error) {
    card.append(element("h3", {}, name), errorBox(error));
  }
  return card;
}

function chosenRuns() { return [...$("compare").querySelectorAll("input:checked")].map(box => box.value); }

onSubmit($("labels").querySelector("form"), async () => {
  const warnings = new Set(), features = $("features").value;
  const cards = chosenRuns().length ? await Promise.all(chosenRuns().map(name => classify(name, features, warnings)))
    : [errorBox(new Error("Choose at least one model."))];
  $("labels-answers").replaceChildren(...[...warnings].map(words => element("p", {class: "notice"}, words)), ...cards);
});

// A file.

$("rows-file").addEventListener("change", async () => {
  $("rows-answer").replaceChildren();
  table = null;
  try {
    const file = $("rows-file").files[0];
    if (!file) return;
    table = readCsv(await file.text());
    const known = ["features", "text", "question", "input", ...models.flatMap(model => model.task === labelTask() ? model.text_fields || [] : [])];
    const guess = table.columns.find(column => known.includes(column));
    $("rows-column").replaceChildren(element("option", {value: ""}, "all columns: Name: value, Name: value"),
      ...table.columns.map(column => element("option", {value: column}, column)));
    $("rows-column").value = guess || "";
  } catch (error) { $("rows-answer").replaceChildren(errorBox(error)); }
  $("rows-columns").hidden = !table;
});

function textOf(row) {
  const column = $("rows-column").value;
  if (column) return row[column];
  const title = name => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
  const own = models.find(model => model.task === labelTask() && model.text_columns);
  const names = (own ? own.text_columns : []).filter(name => name in row);  // in the order that it was trained on
  return (names.length ? names : Object.keys(row)).map(name => [name, row[name].trim()])
    .filter(([, value]) => value).map(([name, value]) => title(name) + ": " + value).join(", ");
}

// The answers to some texts; where one of them is refused, the others are answered all the same.
async function classifyTexts(name, texts, signal) {
  try {
    return (await ask(labelPath(name, true), {body: texts.map(features => ({features})), signal})).answer;
  } catch (error) {
    if (error.name === "AbortError" || ![413, 422].includes(error.status)) throw error;
    if (texts.length === 1) return [{error: error.message}];
    const half = Math.ceil(texts.length / 2);
    return [...await classifyTexts(name, texts.slice(0, half), signal), ...await classifyTexts(name, texts.slice(half), signal)];
  }
}

onSubmit($("labels-file").querySelector("form"), async () => {
  const target = $("rows-answer"), runs = chosenRuns();
  if (!table) return target.replaceChildren(errorBox(new Error("Choose a CSV file with rows.")));
  if (!runs.length) return target.replaceChildren(errorBox(new Error("Choose at least one model.")));
  target.replaceChildren();
  const running = progress(target, "begun"), texts = table.rows.map(textOf), made = texts.map((text, i) => ({row: i + 1, text}));
  const warned = new Map(), columns = ["row", "text"];
  try {
    for (const name of runs) {
      const [label, sure, fault] = runs.length > 1 ? [name, name + " probability", name + " error"] : ["label", "probability", "error"];
      columns.push(label, sure);
      for (let start = 0; start < texts.length; start += AT_ONCE) {
        running.say(name + ": " + start + " of " + texts.length + " rows");
        const answers = await classifyTexts(name, texts.slice(start, start + AT_ONCE).map(text => text || " "), running.signal);
        answers.forEach((answer, i) => {
          const row = made[start + i];
          if (answer.error) { row[fault] = answer.error; return; }
          row[label] = answer.prediction || "no answer";
          row[sure] = Number(Math.max(...Object.values(answer.probabilities)).toFixed(4));
          if (answer.warning && name === runs[0]) warned.set(answer.warning, (warned.get(answer.warning) || 0) + 1);
        });
      }
      if (made.some(row => fault in row)) columns.push(fault);
    }
    target.append(...[...warned].map(([words, count]) => element("p", {class: "notice"}, count + " rows: " + words)),
      element("p", {}, texts.length + " rows in " + running.seconds().toFixed(1) + " s"), results("labels", columns, made, ["text"]));
  } catch (error) {
    const done = made.filter(row => Object.keys(row).length > 2);
    target.append(error.name === "AbortError" ? element("p", {}, "Stopped after " + done.length + " rows.") : errorBox(error));
    if (done.length) target.append(results("labels", columns, done, ["text"]));
  } finally { running.end(); }
});
