// The questions as one table: its filters, its rows, and all completions of an opened question side by side.

const CLIP = 600; // characters of a text in a closed row
const STRIP = 32; // most marks in a closed row
const COLUMNS = [["", ""], ["question", ""], ["right", "right"], ["completion", ""], ["tokens, reward", "tokens"]];

function mark(right) {
  if (!has(right)) return { kind: "none", sign: "\u2013", word: "not judged" };
  return right ? { kind: "good", sign: "\u2713", word: "right" } : { kind: "bad", sign: "\u2717", word: "wrong" };
}

function chips(answer) {
  return answer.verdicts.map(([name, score, status, reason]) => {
    const { kind, sign } = mark(score === null ? null : score >= 1);
    const value = score > 0 && score < 1 ? number(score) : sign;
    const why = [status, reason].filter(Boolean).join(", ");
    return el("span", { class: `chip ${kind}` }, `${value} ${name}${why && `: ${why}`}`);
  });
}

// One completion of an opened row.
function answerCard(answer) {
  const { kind, sign, word } = mark(answer.right);
  const facts = [
    has(answer.tokens) && `${number(answer.tokens)} tokens`, answer.cut && "truncated",
    has(answer.reward) && `reward ${number(answer.reward)}`,
    has(answer.advantage) && `advantage ${number(answer.advantage)}`];
  return el("div", { class: `answer ${kind}` },
    el("div", { class: "mode" }, el("b", { class: `mark ${kind}`, title: word }, sign), ` ${answer.label}`,
      facts.filter(Boolean).map((fact) => ` \u00b7 ${fact}`)),
    el("pre", { dir: "auto" }, answer.text || "(empty)"), chips(answer), (answer.more || []).map(answerCard));
}

function thumbnails(row, pictures, most) {
  const shown = row.pictures.slice(0, most), more = row.pictures.length - shown.length;
  return [
    shown.map((place) => el("img", { src: pictures[place], alt: "", decoding: "async" })),
    more ? el("small", {}, `+${more}`) : null];
}

// The strip of small marks: one per stage, or per completion of a group.
function strip(row, shown) {
  const marks = row.answers.slice(0, STRIP).map((answer) => {
    const { kind, sign, word } = mark(answer.right), frame = answer === shown ? " shown" : "";
    return el("span", { class: `mark ${kind}${frame}`, title: `${answer.label}: ${word}` }, sign);
  });
  return el("div", { class: "strip" }, marks, row.answers.length > STRIP ? `+${row.answers.length - STRIP}` : null);
}

function clipped(text) {
  return text.length > CLIP ? `${text.slice(0, CLIP)}\u2026` : text || "(empty)";
}

function openedRow(row, data) {
  const prompt = row.question + (row.mode === "think" ? `\n${data.contract}` : "");
  return el("tr", { class: "opened" }, el("td", { colspan: COLUMNS.length },
    el("div", { class: "prompt" },
      el("div", { class: "pictures" }, thumbnails(row, data.pictures)),
      el("div", {}, el("div", { class: "mode" }, "prompt"), el("pre", { dir: "auto" }, prompt),
        el("div", { class: "mode" }, "gold answer"), el("pre", { dir: "auto" }, row.gold || "(none)"))),
    el("div", { class: "answers", tabindex: 0, role: "region", "aria-label": "completions side by side" },
      row.answers.map(answerCard))));
}

function figures(answer) {
  const sign = answer.advantage < 0 ? "bad" : answer.advantage > 0 ? "good" : "";
  return el("td", { class: "figures" },
    el("div", {}, `${number(answer.tokens)} tokens`),
    answer.cut && el("div", { class: "failed" }, "truncated"),
    has(answer.reward) && el("div", {}, `reward ${number(answer.reward)}`),
    has(answer.advantage) && el("div", { class: sign }, `adv. ${number(answer.advantage)}`));
}

// The rows of one page of the table. `opened` knows the open rows and records every change.
function questionRows(shown, data, opened) {
  return shown.flatMap(([row, answer]) => {
    const toggle = () => {
      if (opened.has(row)) line.nextSibling.remove();
      else line.after(openedRow(row, data));
      opened.turn(row);
      button.setAttribute("aria-expanded", opened.has(row));
    };
    const click = () => { if (!String(getSelection())) toggle(); }; // a click that selects text opens nothing
    const button = el("button", { type: "button", class: "plain", "aria-expanded": opened.has(row) },
      el("span", { dir: "auto" }, clipped(row.question)));
    const line = el("tr", { class: "question", on: { click } },
      el("td", { class: "picture" }, thumbnails(row, data.pictures, 1)),
      el("td", { class: "asked" }, button, el("div", { class: "mode" }, "gold ", el("b", {}, clipped(row.gold))),
        el("div", { class: "mode" }, [row.set, row.source, row.id].filter(Boolean).join(" \u00b7 "))),
      el("td", { class: "marks" }, strip(row, answer)),
      el("td", { class: "said" }, el("pre", { dir: "auto" }, clipped(answer.text)), chips(answer)),
      figures(answer));
    return opened.has(row) ? [line, openedRow(row, data)] : [line];
  });
}

// A choice of one value; `options` are [value, text], and `change` takes the new value by the filter's name.
function choice(label, name, options, filter, change) {
  const select = el("select", { id: `filter-${name}`, on: { change: () => change({ [name]: select.value }) } },
    options.map(([value, text]) => el("option", { value, selected: filter[name] === value }, text)));
  return el("label", {}, el("span", {}, label), select);
}

function filters(data, filter, change) {
  const all = (values) => [...new Set(values)].filter(Boolean).map((value) => [value, value]);
  const answers = data.rows.flatMap((row) => row.answers), stages = all(answers.map((answer) => answer.stage));
  const judges = all(answers.flatMap((answer) => answer.verdicts.map(([name]) => name)));
  const orders = Object.entries(SORTS).flatMap(([key, [name]]) =>
    [[`-${key}`, `${name}, highest first`], [key, `${name}, lowest first`]]);
  const search = el("input", {
    id: "filter-search", type: "search", value: filter.search, placeholder: "question, completion, id",
    on: { input: () => change({ search: search.value }) } });
  const cut = el("input", {
    id: "filter-cut", type: "checkbox", checked: Boolean(filter.cut),
    on: { change: () => change({ cut: cut.checked ? "1" : "" }) } });
  const one = (label, name, options) => choice(label, name, options, filter, change);
  return el("form", { class: "filters", on: { submit: (event) => event.preventDefault() } },
    el("label", { class: "search" }, el("span", {}, "search"), search),
    one("set", "set", [["", "all sets"], ...all(data.rows.map((row) => row.set))]),
    one("source", "source", [["", "all sources"], ...all(data.rows.map((row) => row.source))]),
    one("stage", "stage", [["", "last stage"], ["any", "any stage"], ...stages]),
    one("judged by", "judge", [["", "the verdict"], ...judges]),
    one("verdict", "verdict", [["", "any"], ["right", "right"], ["wrong", "wrong"], ["unscored", "not judged"]]),
    one("change", "flip", [["", "any"], ["changed", "changed"], ["gained", "became right"], ["lost", "became wrong"]]),
    one("since", "base", [["", "the stage before"], ...stages]),
    one("order", "sort", [["", "as evaluated"], ...orders]),
    el("label", { class: "tick-box" }, cut, el("span", {}, "truncated only")));
}
