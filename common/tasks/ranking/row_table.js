"use strict";
// The table of rows in a report: filtered, searched and sorted here, a page of it in the document.
const $ = id => document.getElementById(id);
const {labels, models, rows} = JSON.parse($("rows-data").textContent);
const AT_ONCE = 50, SHORT = 240;
const lowered = rows.map(row => row[1].toLowerCase());
let page = 0, pages = 1;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function fill(id, names, any) {
  $(id).replaceChildren(...(any ? [make("option", {value: -1}, any)] : []), ...names.map((name, i) => make("option", {value: i}, name)));
}

function marked(text, word) {
  const parts = [], low = text.toLowerCase();
  let at = 0;
  for (let next; word && low.length === text.length && (next = low.indexOf(word, at)) >= 0; at = next + word.length) {
    parts.push(text.slice(at, next), make("mark", {}, text.slice(next, next + word.length)));
  }
  return [...parts, text.slice(at)];
}

function shown(text, word) {
  if (text.length <= SHORT || word) return marked(text, word);
  return [make("details", {}, make("summary", {}, text.slice(0, SHORT) + " …"), text.slice(SHORT))];
}

function chosen() {
  const [model, truth, called, order] = ["model", "true", "predicted", "order"].map(name => Number($("rows-" + name).value));
  const word = $("rows-search").value.trim().toLowerCase(), wrong = $("rows-wrong").checked;
  const kept = [];
  rows.forEach((row, i) => {
    if ((truth < 0 || row[2] === truth) && (called < 0 || row[3][model] === called) && (!wrong || row[3][model] !== row[2])
      && (!word || lowered[i].includes(word))) kept.push(row);
  });
  if (order) kept.sort((a, b) => order * (a[4][model] - b[4][model]) || a[0] - b[0]);
  return {kept, model, word};
}

function show() {
  const {kept, model, word} = chosen();
  pages = Math.max(1, Math.ceil(kept.length / AT_ONCE));
  page = Math.min(page, pages - 1);
  const head = ["Row", "True label", "Called", "Sure", "Text"].map(title => make("th", {scope: "col"}, title));
  const body = kept.slice(page * AT_ONCE, (page + 1) * AT_ONCE).map(([number, text, truth, called, sure]) => make("tr", {},
    make("th", {scope: "row"}, number.toLocaleString("en")), make("td", {}, labels[truth]),
    make("td", {class: called[model] === truth ? "up" : "down"}, labels[called[model]]),
    make("td", {}, (100 * sure[model]).toFixed(1) + " %"), make("td", {class: "text"}, ...shown(text, word))));
  $("rows-table").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  $("rows-table").hidden = !kept.length;
  const wrong = kept.filter(row => row[3][model] !== row[2]).length;
  $("rows-count").textContent = kept.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " rows, "
    + wrong.toLocaleString("en") + " of them labelled wrongly by " + models[model];
  $("rows-page").textContent = "page " + (page + 1).toLocaleString("en") + " of " + pages.toLocaleString("en");
  $("rows-back").disabled = page === 0;
  $("rows-on").disabled = page + 1 === pages;
  document.querySelector(".pages").hidden = pages === 1;
}

function first() { page = 0; show(); }

fill("rows-model", models);
fill("rows-true", labels, "any");
fill("rows-predicted", labels, "any");
const form = document.querySelector(".filters");
form.hidden = false;
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("input", first);
for (const [id, step] of [["rows-back", -1], ["rows-on", 1]]) $(id).addEventListener("click", () => { page += step; show(); });
for (const cell of document.querySelectorAll("button[data-model]")) cell.addEventListener("click", () => {
  for (const name of ["model", "true", "predicted"]) $("rows-" + name).value = cell.dataset[name];
  $("rows-search").value = "";
  $("rows-wrong").checked = false;
  first();
  $("rows").scrollIntoView();
  $("rows-model").focus({preventScroll: true});
});
show();
