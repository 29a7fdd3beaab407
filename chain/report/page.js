// The page: its sections, the reader's choices (kept in the address), and newer content while a run trains.

const PAGE = 25; // questions of one page of the table
const NONE = {
  set: "", source: "", stage: "", judge: "", verdict: "", flip: "", base: "", sort: "", cut: "", search: "",
  page: "0", tab: "" };
let content = JSON.parse(document.getElementById("data").textContent);
let state = { ...NONE, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
const sections = new Map(); // name of a section -> its element
let waiting = 0; // the timer of a search that is being typed
let version = null; // of the content that the server sent last

// The open questions. Their keys outlive newer content.
const opened = {
  keys: new Set(),
  key: (row) => JSON.stringify([row.set, row.source, row.id]),
  has: (row) => opened.keys.has(opened.key(row)),
  turn: (row) => { if (!opened.keys.delete(opened.key(row))) opened.keys.add(opened.key(row)); },
};

function remember(changes) {
  state = { ...state, ...changes };
  const kept = Object.entries(state).filter(([name, value]) => name in NONE && value !== NONE[name]);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function changeFilter(changes) {
  remember({ page: "0", ...changes });
  clearTimeout(waiting);
  waiting = setTimeout(fillQuestions, "search" in changes ? 150 : 0);
}

function sortBy(key) {
  changeFilter({ sort: state.sort === `-${key}` ? key : `-${key}` });
  document.getElementById("filter-sort").value = state.sort;
}

function clearFilters() {
  remember({ ...NONE, tab: state.tab });
  show("questions");
}

function openStage(name) {
  remember({ tab: name });
  show("training");
  sections.get("training").scrollIntoView({ block: "start" });
}

function turnTo(page) {
  remember({ page: String(page) });
  fillQuestions();
  document.getElementById("question-table").scrollIntoView({ block: "nearest" });
}

// Fill the table of the questions section by the present filters.
function fillQuestions() {
  const data = content.questions, found = selection(data.rows, state);
  const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
  const at = Math.max(0, Math.min(last, Math.floor(Number(state.page)) || 0));
  const heads = COLUMNS.map(([name, key]) =>
    el("th", { scope: "col" }, key ? plainButton(name, () => sortBy(key)) : name));
  const count = (list) => list.length.toLocaleString("en-US");
  document.getElementById("question-count").textContent = `${count(found)} of ${count(data.rows)} questions`;
  document.getElementById("question-table").replaceChildren(el("table", { class: "questions" },
    el("thead", {}, el("tr", {}, heads)),
    el("tbody", {}, questionRows(found.slice(at * PAGE, (at + 1) * PAGE), data, opened))));
  const turn = (text, page) =>
    el("button", { type: "button", disabled: page < 0 || page > last, on: { click: () => turnTo(page) } }, text);
  document.getElementById("question-pages").replaceChildren(
    turn("previous", at - 1), ` page ${at + 1} of ${last + 1} `, turn("next", at + 1));
}

function questionsSection(data) {
  setTimeout(fillQuestions, 0); // once the section is part of the page
  return el("div", {}, filters(data, state, changeFilter),
    el("p", { class: "soft" }, el("span", { id: "question-count", role: "status" }), " ",
      el("button", { type: "button", on: { click: clearFilters } }, "clear filters")),
    el("div", { id: "question-table", class: "scroll", tabindex: 0, role: "region", "aria-label": "questions" }),
    el("p", { id: "question-pages", class: "pages" }),
    data.left.map((line) => el("p", { class: "soft" }, `Left out: ${line}.`)));
}

function headSection(head) {
  return el("div", {}, el("h1", {}, head.title), head.about && el("p", {}, head.about),
    el("p", { class: "soft" }, head.facts.join(" \u00b7 "), content.live && el("span", { id: "live" })),
    head.failed && el("p", { class: "failed banner" }, head.failed));
}

// Name of a section -> its title and what fills it from its part of the content.
const SECTIONS = {
  head: ["", headSection],
  stages: ["Stages", (data) => stagesSection(data, openStage)],
  benchmarks: ["Public benchmarks", (data) => data && benchmarksSection(data)],
  training: ["Curves", (data) => trainingSection(data, state.tab, openStage)],
  questions: ["Questions", (data) => data.rows.length > 0 && questionsSection(data)],
  sets: ["Data", (data) => data.length > 0 && el("div", {}, titledGrids(data))],
  lineage: ["Lineage", lineageSection],
};

function show(name) {
  const [title, fill] = SECTIONS[name], filled = fill(content[name]);
  sections.get(name).replaceChildren(...(filled ? [title && el("h2", {}, title), filled] : []));
  const linked = Object.entries(SECTIONS).filter(([key, [text]]) => text && sections.get(key).firstChild);
  const jump = (key) => () => sections.get(key).scrollIntoView({ block: "start" });
  document.getElementById("contents").replaceChildren(
    ...linked.map(([key, [text]]) => plainButton(text, jump(key))));
}

// Take newer content: only the sections that differ are drawn again, and the focus stays.
function take(newer) {
  const old = content, { id, selectionStart } = document.activeElement || {};
  content = newer;
  for (const name of Object.keys(SECTIONS)) {
    if (JSON.stringify(old[name]) !== JSON.stringify(newer[name])) show(name);
  }
  const again = id && document.getElementById(id);
  if (!again || again === document.activeElement) return;
  again.focus({ preventScroll: true });
  if (typeof selectionStart === "number") again.setSelectionRange(selectionStart, selectionStart);
}

async function follow() {
  let note;
  try {
    const reply = await fetch("content.json", { headers: version ? { "If-None-Match": version } : {} });
    if (!reply.ok && reply.status !== 304) throw new Error(`status ${reply.status}`);
    if (reply.ok) take(await reply.json());
    version = reply.headers.get("ETag");
    note = `live, ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    note = `not live: ${error.message}`;
  }
  document.getElementById("live").textContent = ` \u00b7 ${note}`;
  setTimeout(follow, 1000 * content.live);
}

const page = document.getElementById("page");
page.replaceChildren();
for (const name of Object.keys(SECTIONS)) {
  sections.set(name, el("section", { id: name }));
  page.append(sections.get(name));
  if (name === "head") page.append(el("nav", { id: "contents", "aria-label": "sections" }));
}
Object.keys(SECTIONS).forEach(show);
if (content.live) setTimeout(follow, 1000 * content.live);
