// Tables that come in and go out: CSV, what was made of its rows, downloads.

// {columns, rows: [{column: cell}]}; cells are separated by what the header has most of: commas, semicolons or tabs.
function readCsv(text) {
  const first = text.replace(/^\ufeff/, "").split(/\r?\n/, 1)[0];
  const mark = [",", ";", "\t"].reduce((best, each) => first.split(each).length > first.split(best).length ? each : best);
  const lines = [];
  let cells = [], cell = "", quoted = false;
  const source = text.replace(/^\ufeff/, "");
  for (let i = 0; i < source.length; i++) {
    const letter = source[i];
    if (quoted) {
      if (letter !== '"') cell += letter;
      else if (source[i + 1] === '"') { cell += '"'; i++; } else quoted = false;
    } else if (letter === '"' && !cell) quoted = true;
    else if (letter === mark) { cells.push(cell); cell = ""; }
    else if (letter === "\n") { lines.push([...cells, cell.replace(/\r$/, "")]); cells = []; cell = ""; }
    else cell += letter;
  }
  if (quoted) throw new Error("The file is not CSV: a quotation mark is not closed.");
  if (cell || cells.length) lines.push([...cells, cell]);
  const [columns = [], ...rest] = lines;
  const full = rest.filter(line => line.some(part => part.trim()));
  const wrong = full.findIndex(line => line.length !== columns.length);
  if (wrong >= 0) throw new Error(`Row ${wrong + 1} has ${full[wrong].length} cells where the header has ${columns.length}.`);
  if (!full.length) throw new Error("The file has no rows below its line of column names.");
  const names = columns.map(name => name.trim());
  return {columns: names, rows: full.map(line => Object.fromEntries(names.map((name, i) => [name, line[i]])))};
}

function toCsv(columns, rows) {
  const shown = value => value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const cell = value => /[",;\t\r\n]/.test(shown(value)) ? '"' + shown(value).replaceAll('"', '""') + '"' : shown(value);
  return [columns, ...rows.map(row => columns.map(name => row[name]))].map(line => line.map(cell).join(",")).join("\r\n") + "\r\n";
}

// The rows {column: value} as a table, at most `MOST_SHOWN` of them, with downloads of all.
const MOST_SHOWN = 200;
function results(name, columns, rows, wide = []) {
  const shown = rows.slice(0, MOST_SHOWN);
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...columns.map(title => element("th", {scope: "col"}, title)))),
    element("tbody", {}, ...shown.map(row => element("tr", {}, ...columns.map((column, i) => {
      const value = row[column] ?? "";
      return element(i ? "td" : "th", {...(i ? {} : {scope: "row"}), ...(wide.includes(column) ? {class: "text"} : {})},
        value instanceof Node ? value : typeof value === "object" ? JSON.stringify(value) : String(value));
    })))));
  const plain = rows.map(row => Object.fromEntries(Object.entries(row).filter(([, value]) => !(value instanceof Node))));
  const names = columns.filter(column => plain.some(row => column in row));
  return element("div", {}, element("div", {class: "results", tabindex: "0", role: "region", "aria-label": "Results"}, table),
    ...(rows.length > shown.length ? [element("p", {class: "quiet"}, `The first ${shown.length} of ${rows.length} rows; the downloads have all.`)] : []),
    saveButton("Download CSV", name + ".csv", "text/csv", () => toCsv(names, plain)),
    saveButton("Download JSON", name + ".json", "application/json", () => JSON.stringify(plain, null, 2) + "\n"));
}
