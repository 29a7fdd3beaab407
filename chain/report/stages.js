// The sections about stages: their table, their curves, benchmarks, data and lineage.

function stagesSection(data, open) {
  if (!data.rows.length && !data.others.length) return el("p", { class: "soft" }, "No stage has finished yet.");
  const heads = ["stage", ...data.sets.map((name) => `${name} accuracy`), ...data.extra, "format rate", "truncated", "mean tokens", "time", "alarms"];
  const each = (row, show) => row.scores.map((score) => (score ? show(score) : "\u2013")).join(" / ");
  const rows = data.rows.map((row) => [
    el("button", { class: "plain link", on: { click: () => open(row.name) } }, row.name),
    ...row.scores.map((score, at) => (score ? accuracy(score, at) : "\u2013")), ...row.extra,
    each(row, (score) => score.format_rate.toFixed(2)), each(row, (score) => (score.truncated_rate ?? null) === null ? "\u2013" : score.truncated_rate.toFixed(2)),
    each(row, (score) => score.mean_tokens.toFixed(1)),
    el("span", {}, seconds(row.seconds), row.eval_seconds === null ? "" : el("small", {}, ` + ${seconds(row.eval_seconds)}`)),
    row.alarms ? el("span", { class: "failed" }, `\u25b2 ${row.alarms}`) : "0"]);
  for (const other of data.others) {
    const name = el("button", { class: "plain link", on: { click: () => open(other.name) } }, other.name);
    rows.push([name, el("span", { class: other.state === "failed" ? "failed" : "soft" }, other.state), ...heads.slice(2).map(() => "")]);
  }
  const scored = data.rows.filter((row) => row.scores.some(Boolean));
  const series = data.sets.map((name, at) => [name, scored.map((row) => row.scores[at] && [row.scores[at].accuracy, ...row.scores[at].ci95])]);
  return el("div", {}, grid(heads, rows, "stages"),
    el("p", { class: "soft" }, `Greedy, on the held-out rows; in brackets the 95% Wilson interval. ${data.sets.length > 1 ? `Rates and tokens: ${data.sets.join(" / ")}. ` : ""}Time: training with the data made for it + evaluation.`),
    data.outdated.length ? el("p", {}, `Not shown, because they come from an earlier run of a stage before them: ${data.outdated.join(", ")}.`) : [],
    scored.length > 1 ? intervalChart("Held-out accuracy along the chain", scored.map((row) => row.name), series) : []);
}

function accuracy(score, at) {
  const bar = el("span", { class: `bar s${at % COLOURS}` });
  bar.style.width = `${(100 * score.accuracy).toFixed(1)}%`;
  const interval = el("small", {}, ` [${score.ci95.map((end) => end.toFixed(3)).join(", ")}]`);
  return el("span", { title: `n = ${score.n}` }, score.accuracy.toFixed(3), interval, el("span", { class: "track" }, bar));
}

// One stage at a time, chosen by its tab. `chosen` is the stage's name, "" for the default.
function trainingSection(stages, chosen, open) {
  const usual = stages.find((one) => one.state) || stages.filter((one) => one.groups.length).at(-1) || stages.at(-1);
  const shown = stages.find((one) => one.name === chosen) || usual;
  if (!shown) return el("p", { class: "soft" }, "No stage has logged a step yet.");
  const tabs = stages.map((one) => el("button", { role: "tab", "aria-selected": one === shown, on: { click: () => open(one.name) } },
    one.name, one.state === "failed" ? " \u2717" : one.state ? " \u2026" : "", one.alarms.length ? el("span", { class: "failed", title: "alarms" }, " \u25b2") : ""));
  return el("div", {}, el("div", { class: "tabs", role: "tablist" }, tabs), el("div", { role: "tabpanel" },
    el("h3", {}, shown.name, shown.state ? `: ${shown.state}` : ""), el("p", { class: "soft" }, shown.about),
    shown.notes.map((note) => el("p", {}, note)),
    shown.error ? el("pre", { class: "failed" }, shown.error) : [],
    shown.alarms.length ? el("div", { class: "alarms" }, el("h3", {}, "Alarms"), el("ul", {}, shown.alarms.map((line) => el("li", {}, line)))) : [],
    shown.tables.map((table) => [el("h3", {}, table.title), grid(table.heads, table.rows, table.title)]),
    shown.groups.map((group, at) => curveGroup(group, shown.marks, at === 0))));
}

// A group of charts; the charts of a closed group are drawn when it is opened.
function curveGroup(group, marks, open) {
  const charts = el("div", { class: "charts" });
  const draw = () => { if (!charts.firstChild) charts.append(...group.charts.map((chart) => lineChart(chart, marks))); };
  if (open) draw();
  return el("details", { open, on: { toggle: draw } }, el("summary", {}, `${group.title} (${group.charts.length})`), charts);
}

function benchmarksSection(data) {
  return el("div", {}, grid(data.heads, data.rows, "benchmarks"), data.notes.map((note) => el("p", { class: "soft" }, note)));
}

function setsSection(tables) {
  return el("div", {}, tables.map((table) => [el("h3", {}, table.title), grid(table.heads, table.rows, table.title)]));
}

function lineageSection(data) {
  const pairs = (list) => el("dl", {}, list.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  return el("div", {}, data.entries.map((entry) => el("details", { class: "entry" },
    el("summary", {}, el("b", {}, entry.name), entry.from ? ` from ${entry.from}` : "", ` \u00b7 ${entry.inputs.length} ${entry.inputs.length === 1 ? "input" : "inputs"}`,
      entry.differs.length ? el("span", { class: "failed" }, " \u00b7 other package versions than before it") : ""),
    pairs(entry.facts), entry.inputs.length ? [el("h3", {}, "Inputs and their hashes"), pairs(entry.inputs)] : [],
    entry.differs.length ? [el("h3", {}, "Versions that differ"), el("p", {}, entry.differs.join(", "))] : [])),
  el("p", { class: "soft" }, data.versions));
}
