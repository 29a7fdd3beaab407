// The questions as one table: filters, sorting, pages, and all completions of a question side by side.

const PAGE = 25;
const CLIP = 600; // characters of a completion in a closed row

// How rows can be sorted: a number of the row and of its shown answer, or null, which comes last.
const SORTS = {
  tokens: ["tokens", (row, answer) => answer.tokens],
  reward: ["reward", (row, answer) => answer.reward],
  advantage: ["advantage", (row, answer) => answer.advantage],
  right: ["completions that are right, share", (row) => row.answers.filter((one) => one.right).length / row.answers.length],
  flips: ["changes of the verdict between stages", (row) => row.answers.filter((one, at) => at && flipped(row, one, "")).length],
};

// Whether an answer is right by the filter's judge: "" is the answer's own verdict, else a reward component's.
function rightBy(answer, judge) {
  if (!judge) return answer.right;
  const verdict = answer.verdicts.find(([name]) => name === judge);
  return verdict === undefined ? undefined : verdict[1] === null ? null : verdict[1] >= 1;
}

// "gained", "lost" or "": how the answer differs from the one of the stage `base`, or of the stage before.
function flipped(row, answer, base) {
  const before = base ? row.answers.find((one) => one.stage === base) : row.answers[row.answers.indexOf(answer) - 1];
  if (!before || before.stage === answer.stage || Boolean(before.right) === Boolean(answer.right)) return "";
  return answer.right ? "gained" : "lost";
}

// The answers of a row that the filters let through, best first by the chosen order.
function passing(row, state) {
  if (state.set && row.set !== state.set || state.source && row.source !== state.source) return [];
  const stage = state.stage || row.answers.at(-1).stage;
  const words = state.search.toLowerCase();
  const inRow = !words || `${row.id}\n${row.question}\n${row.gold}`.toLowerCase().includes(words);
  const wanted = { right: true, wrong: false, unscored: null };
  return row.answers.filter((answer) =>
    (stage === "any" || answer.stage === stage)
    && (!state.judge || rightBy(answer, state.judge) !== undefined)
    && (!state.verdict || rightBy(answer, state.judge) === wanted[state.verdict])
    && (!state.flip || (state.flip === "changed" ? flipped(row, answer, state.base) : flipped(row, answer, state.base) === state.flip))
    && (!state.cut || answer.cut)
    && (inRow || answer.text.toLowerCase().includes(words)));
}

// [row, shown answer] of every row that the filters let through, in order.
function selection(rows, state) {
  const found = rows.map((row) => [row, passing(row, state)]).filter(([, answers]) => answers.length);
  const key = state.sort.replace(/^-/, ""), sort = SORTS[key], sign = state.sort.startsWith("-") ? -1 : 1;
  if (!sort) return found.map(([row, answers]) => [row, answers[0]]);
  const value = (row, answer) => { const one = sort[1](row, answer); return one === null || one === undefined ? Infinity : sign * one; };
  const best = found.map(([row, answers]) => answers.map((answer) => [row, answer, value(row, answer)]).reduce((a, b) => (b[2] < a[2] ? b : a)));
  return best.sort((a, b) => (a[2] < b[2] ? -1 : a[2] > b[2] ? 1 : 0));
}

function mark(right) {
  const [kind, sign, word] = right === null || right === undefined ? ["none", "\u2013", "not judged"] : right ? ["good", "\u2713", "right"] : ["bad", "\u2717", "wrong"];
  return { kind, sign, word };
}

function chips(answer) {
  return answer.verdicts.map(([name, score, status, reason]) => {
    const { kind, sign } = mark(score === null ? null : score >= 1);
    const partly = score !== null && score > 0 && score < 1 ? number(score) : sign;
    return el("span", { class: `chip ${kind}` }, `${partly} ${name}${status || reason ? ": " : ""}${[status, reason].filter(Boolean).join(", ")}`);
  });
}

// One completion of an opened row.
function answerCard(answer) {
  const { kind, sign, word } = mark(answer.right);
  const facts = [answer.tokens !== null && `${number(answer.tokens)} tokens`, answer.cut && "truncated",
    answer.reward !== undefined && `reward ${number(answer.reward)}`, answer.advantage !== undefined && answer.advantage !== null && `advantage ${number(answer.advantage)}`];
  return el("div", { class: `answer ${kind}` },
    el("div", { class: "mode" }, el("b", { class: `mark ${kind}`, title: word }, sign), ` ${answer.label}`, facts.filter(Boolean).map((fact) => ` \u00b7 ${fact}`)),
    el("pre", { dir: "auto" }, answer.text || "(empty)"), chips(answer), (answer.more || []).map(answerCard));
}

function thumbnails(row, pictures, all) {
  const shown = all ? row.pictures : row.pictures.slice(0, 1);
  const more = row.pictures.length - shown.length;
  return [shown.map((place) => el("img", { src: pictures[place], alt: "", loading: "lazy", decoding: "async" })), more ? el("small", {}, `+${more}`) : []];
}

// The strip of small marks: one per stage, or per completion of a group.
function strip(row, shown) {
  return el("div", { class: "strip" }, row.answers.slice(0, 32).map((answer) => {
    const { kind, sign, word } = mark(answer.right);
    return el("span", { class: `mark ${kind}${answer === shown ? " shown" : ""}`, title: `${answer.label}: ${word}` }, sign);
  }), row.answers.length > 32 ? `+${row.answers.length - 32}` : []);
}

function clipped(text) {
  return text.length > CLIP ? `${text.slice(0, CLIP)}\u2026` : text || "(empty)";
}

function openedRow(row, data, columns) {
  return el("tr", { class: "opened" }, el("td", { colspan: columns },
    el("div", { class: "prompt" }, el("div", { class: "pictures" }, thumbnails(row, data.pictures, true)),
      el("div", {}, el("div", { class: "mode" }, "prompt"),
        el("pre", { dir: "auto" }, row.question + (row.mode === "think" ? `\n${data.contract}` : "")),
        el("div", { class: "mode" }, "gold answer"), el("pre", { dir: "auto" }, row.gold || "(none)"))),
    el("div", { class: "answers", tabindex: 0, role: "region", "aria-label": "completions side by side" }, row.answers.map(answerCard))));
}

// The body of the table: the rows of one page. `opened` holds the rows that are open.
function questionRows(shown, data, opened) {
  return shown.flatMap(([row, answer]) => {
    const toggle = () => {
      const next = line.nextSibling;
      if (opened.has(row)) { opened.delete(row); next.remove(); } else { opened.add(row); line.after(openedRow(row, data, 5)); }
      button.setAttribute("aria-expanded", opened.has(row));
    };
    const button = el("button", { class: "plain", "aria-expanded": opened.has(row) }, el("span", { dir: "auto" }, clipped(row.question)));
    const line = el("tr", { class: "question", on: { click: (event) => { if (!String(getSelection())) toggle(event); } } },
      el("td", { class: "picture" }, thumbnails(row, data.pictures, false)),
      el("td", { class: "asked" }, button, el("div", { class: "mode" }, "gold ", el("b", {}, clipped(row.gold))),
        el("div", { class: "mode" }, [row.set, row.source, row.id].filter(Boolean).join(" \u00b7 "))),
      el("td", { class: "marks" }, strip(row, answer)),
      el("td", { class: "said" }, el("pre", { dir: "auto" }, clipped(answer.text)), chips(answer)),
      el("td", { class: "figures" }, el("div", {}, `${number(answer.tokens)} tokens`), answer.cut ? el("div", { class: "failed" }, "truncated") : [],
        answer.reward === undefined ? [] : el("div", {}, `reward ${number(answer.reward)}`),
        answer.advantage === undefined || answer.advantage === null ? [] : el("div", { class: answer.advantage < 0 ? "bad" : "good" }, `adv. ${number(answer.advantage)}`)));
    return opened.has(row) ? [line, openedRow(row, data, 5)] : [line];
  });
}

function choice(label, name, options, state, changed) {
  const select = el("select", { id: `filter-${name}`, on: { change: () => changed({ [name]: select.value }) } },
    options.map(([value, text]) => el("option", { value, selected: state[name] === value }, text)));
  return el("label", {}, el("span", {}, label), select);
}

function filters(data, state, changed) {
  const all = (values) => [...new Set(values)].filter(Boolean).map((value) => [value, value]);
  const answers = data.rows.flatMap((row) => row.answers);
  const stages = all(answers.map((answer) => answer.stage));
  const search = el("input", { id: "filter-search", type: "search", value: state.search, placeholder: "question, completion, id", on: { input: () => changed({ search: search.value }) } });
  const cut = el("input", { id: "filter-cut", type: "checkbox", checked: Boolean(state.cut), on: { change: () => changed({ cut: cut.checked ? "1" : "" }) } });
  const orders = Object.entries(SORTS).flatMap(([key, [name]]) => [[`-${key}`, `${name}, highest first`], [key, `${name}, lowest first`]]);
  return el("form", { class: "filters", on: { submit: (event) => event.preventDefault() } },
    el("label", { class: "search" }, el("span", {}, "search"), search),
    choice("set", "set", [["", "all sets"], ...all(data.rows.map((row) => row.set))], state, changed),
    choice("source", "source", [["", "all sources"], ...all(data.rows.map((row) => row.source))], state, changed),
    choice("stage", "stage", [["", "last stage"], ["any", "any stage"], ...stages], state, changed),
    choice("judged by", "judge", [["", "the verdict"], ...all(answers.flatMap((answer) => answer.verdicts.map(([name]) => name)))], state, changed),
    choice("verdict", "verdict", [["", "any"], ["right", "right"], ["wrong", "wrong"], ["unscored", "not judged"]], state, changed),
    choice("change", "flip", [["", "any"], ["changed", "changed"], ["gained", "became right"], ["lost", "became wrong"]], state, changed),
    choice("since", "base", [["", "the stage before"], ...stages], state, changed),
    choice("order", "sort", [["", "as evaluated"], ...orders], state, changed),
    el("label", { class: "tick-box" }, cut, el("span", {}, "truncated only")));
}
