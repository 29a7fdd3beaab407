// The sections about stages: their table, their curves, benchmarks, data and lineage.

// A stage per row with its scores; `open` shows the curves of a stage.
function stagesSection(data, open) {
  if (!data.rows.length && !data.others.length) return el("p", { class: "soft" }, "No stage has finished yet.");
  const heads = ["stage", ...data.sets.map((name) => `${name} accuracy`), ...data.extra,
    "format rate", "truncated", "mean tokens", "time", "alarms"];
  const link = (name) => plainButton(name, () => open(name));
  const rows = data.rows.map((row) => [link(row.name), ...stageCells(row)]);
  for (const { name, state } of data.others) {
    const word = el("span", { class: state === "failed" ? "failed" : "soft" }, state);
    rows.push([link(name), word, ...heads.slice(2).map(() => "")]);
  }
  const scored = data.rows.filter((row) => row.scores.some(Boolean));
  const interval = (score) => score && [score.accuracy, ...score.ci95];
  const series = data.sets.map((name, at) => [name, scored.map((row) => interval(row.scores[at]))]);
  const order = data.sets.length > 1 ? `Rates and tokens: ${data.sets.join(" / ")}. ` : "";
  return el("div", {}, grid(heads, rows, "stages"),
    el("p", { class: "soft" }, "Greedy, on the held-out rows; in brackets the 95% Wilson interval. ", order,
      "Time: training with the data made for it + evaluation."),
    data.outdated.length > 0 && el("p", {},
      `Not shown, because they come from an earlier run of a stage before them: ${data.outdated.join(", ")}.`),
    scored.length > 1 && intervalChart("Held-out accuracy along the chain", scored.map((row) => row.name), series));
}

function stageCells(row) {
  const each = (show) => row.scores.map((score) => (score ? show(score) : "\u2013")).join(" / ");
  const rate = (value) => (has(value) ? value.toFixed(2) : "\u2013");
  const evaluation = has(row.eval_seconds) && el("small", {}, ` + ${seconds(row.eval_seconds)}`);
  return [
    ...row.scores.map((score, at) => (score ? accuracy(score, at) : "\u2013")), ...row.extra,
    each((score) => rate(score.format_rate)), each((score) => rate(score.truncated_rate)),
    each((score) => score.mean_tokens.toFixed(1)), el("span", {}, seconds(row.seconds), evaluation),
    row.alarms ? el("span", { class: "failed" }, `\u25b2 ${row.alarms}`) : "0"];
}

function accuracy(score, at) {
  const bar = el("span", { class: `bar s${at % COLOURS}` });
  bar.style.width = `${(100 * score.accuracy).toFixed(1)}%`;
  const interval = el("small", {}, ` [${score.ci95.map((end) => end.toFixed(3)).join(", ")}]`);
  return el("span", { title: `n = ${score.n}` },
    score.accuracy.toFixed(3), interval, el("span", { class: "track" }, bar));
}

// One stage at a time, chosen by its tab. `chosen` is the stage's name, "" for the default.
function trainingSection(stages, chosen, open) {
  const usual = stages.find((one) => one.state) || stages.filter((one) => one.groups.length).at(-1) || stages.at(-1);
  const shown = stages.find((one) => one.name === chosen) || usual;
  if (!shown) return el("p", { class: "soft" }, "No stage has logged a step yet.");
  const tabs = stages.map((one) =>
    el("button", { type: "button", role: "tab", "aria-selected": one === shown, on: { click: () => open(one.name) } },
      one.name, one.state === "failed" ? " \u2717" : one.state ? " \u2026" : "",
      one.alarms.length > 0 && el("span", { class: "failed", title: "alarms" }, " \u25b2")));
  return el("div", {}, el("div", { class: "tabs", role: "tablist" }, tabs), el("div", { role: "tabpanel" },
    el("h3", {}, shown.name, shown.state ? `: ${shown.state}` : ""), el("p", { class: "soft" }, shown.about),
    shown.notes.map((note) => el("p", {}, note)),
    shown.error && el("pre", { class: "failed" }, shown.error),
    shown.alarms.length > 0 && [el("h3", {}, "Alarms"), el("ul", {}, shown.alarms.map((line) => el("li", {}, line)))],
    titledGrids(shown.tables),
    shown.groups.map((group, at) => curveGroup(group, shown.marks, at === 0))));
}

// A group of charts; the charts of a closed group are drawn when it is opened.
function curveGroup(group, marks, open) {
  const charts = el("div", { class: "charts" });
  const draw = () => { if (!charts.firstChild) charts.append(...group.charts.map((one) => lineChart(one, marks))); };
  if (open) draw();
  return el("details", { open, on: { toggle: draw } },
    el("summary", {}, `${group.title} (${group.charts.length})`), charts);
}

function titledGrids(tables) {
  return tables.map((table) => [el("h3", {}, table.title), grid(table.heads, table.rows, table.title)]);
}

function benchmarksSection(data) {
  const notes = data.notes.map((note) => el("p", { class: "soft" }, note));
  return el("div", {}, grid(data.heads, data.rows, "benchmarks"), notes);
}

function lineageSection(data) {
  const pairs = (list) => el("dl", {}, list.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  const entry = (one) => el("details", { class: "entry" },
    el("summary", {}, el("b", {}, one.name), one.from && ` from ${one.from}`,
      ` \u00b7 ${one.inputs.length} ${one.inputs.length === 1 ? "input" : "inputs"}`,
      one.differs.length > 0 && el("span", { class: "failed" }, " \u00b7 package versions have changed")),
    pairs(one.facts), one.inputs.length > 0 && [el("h3", {}, "Inputs and their hashes"), pairs(one.inputs)],
    one.differs.length > 0 && [el("h3", {}, "Versions that have changed"), el("p", {}, one.differs.join(", "))]);
  return el("div", {}, data.entries.map(entry), el("p", { class: "soft" }, data.versions));
}
