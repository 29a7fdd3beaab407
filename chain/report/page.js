// The page: its sections, the reader's choices (kept in the address), and newer content while a run trains.

const NONE = { set: "", source: "", stage: "", judge: "", verdict: "", flip: "", base: "", sort: "", cut: "", search: "", page: "0", tab: "" };
let content = JSON.parse(document.getElementById("data").textContent);
let state = { ...NONE, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
const opened = new Set(); // keys of the open questions
const sections = new Map(); // name of a section -> its element
let waiting = 0; // the timer of a search that is being typed
let version = null; // of the content that the server sent last

const rowKey = (row) => JSON.stringify([row.set, row.source, row.id]);
// The open questions as a set of rows; the keys outlive newer content.
const openRows = { has: (row) => opened.has(rowKey(row)), add: (row) => opened.add(rowKey(row)), delete: (row) => opened.delete(rowKey(row)) };

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

function openStage(name) {
  remember({ tab: name });
  show("training");
  sections.get("training").scrollIntoView({ block: "start" });
}

function turn(to) {
  remember({ page: String(to) });
  fillQuestions();
  document.getElementById("question-table").scrollIntoView({ block: "nearest" });
}

// Fill the table of the questions section by the present filters.
function fillQuestions() {
  const data = content.questions, found = selection(data.rows, state), last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
  const at = Math.max(0, Math.min(last, Math.floor(Number(state.page)) || 0));
  const columns = [["", ""], ["question", ""], ["right", "right"], ["completion", ""], ["tokens, reward", "tokens"]];
  const sortBy = (key) => { changeFilter({ sort: state.sort === `-${key}` ? key : `-${key}` }); document.getElementById("filter-sort").value = state.sort; };
  const heads = columns.map(([name, key]) => el("th", { scope: "col" }, key ? el("button", { class: "plain link", on: { click: () => sortBy(key) } }, name) : name));
  document.getElementById("question-count").textContent = `${found.length.toLocaleString("en-US")} of ${data.rows.length.toLocaleString("en-US")} questions`;
  document.getElementById("question-table").replaceChildren(
    el("table", { class: "questions" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, questionRows(found.slice(at * PAGE, (at + 1) * PAGE), data, openRows))));
  document.getElementById("question-pages").replaceChildren(
    el("button", { disabled: at === 0, on: { click: () => turn(at - 1) } }, "previous"), ` page ${at + 1} of ${last + 1} `,
    el("button", { disabled: at === last, on: { click: () => turn(at + 1) } }, "next"));
}

function questionsSection(data) {
  const clear = () => { remember({ ...NONE, tab: state.tab }); show("questions"); };
  setTimeout(fillQuestions, 0);
  return el("div", {}, filters(data, state, changeFilter),
    el("p", { class: "soft" }, el("span", { id: "question-count", role: "status" }), " ", el("button", { on: { click: clear } }, "clear filters")),
    el("div", { id: "question-table", class: "scroll", tabindex: 0, role: "region", "aria-label": "questions" }),
    el("p", { id: "question-pages", class: "pages" }), data.left.map((line) => el("p", { class: "soft" }, `Left out: ${line}.`)));
}

function headSection(head) {
  return el("div", {}, el("h1", {}, head.title), head.about ? el("p", {}, head.about) : [],
    el("p", { class: "soft" }, head.facts.join(" \u00b7 "), content.live ? el("span", { id: "live" }) : ""),
    head.failed ? el("p", { class: "failed banner" }, head.failed) : []);
}

// Name of a section -> its title and what fills it from its part of the content.
const SECTIONS = {
  head: ["", headSection],
  stages: ["Stages", (data) => stagesSection(data, openStage)],
  benchmarks: ["Public benchmarks", (data) => (data ? benchmarksSection(data) : null)],
  training: ["Curves", (data) => trainingSection(data, state.tab, openStage)],
  questions: ["Questions", (data) => (data.rows.length ? questionsSection(data) : null)],
  sets: ["Data", (data) => (data.length ? setsSection(data) : null)],
  lineage: ["Lineage", lineageSection],
};

function show(name) {
  const [title, fill] = SECTIONS[name], filled = fill(content[name]);
  sections.get(name).replaceChildren(...(filled ? [title ? el("h2", {}, title) : "", filled] : []));
  const links = Object.entries(SECTIONS).filter(([key, [text]]) => text && sections.get(key)?.firstChild);
  document.getElementById("contents").replaceChildren(...links.map(([key, [text]]) =>
    el("button", { class: "plain link", on: { click: () => sections.get(key).scrollIntoView({ block: "start" }) } }, text)));
}

// Take newer content: only the sections that differ are drawn again, and the focus stays.
function take(newer) {
  const old = content, focus = document.activeElement?.id, caret = document.activeElement?.selectionStart;
  content = newer;
  for (const name of Object.keys(SECTIONS)) if (JSON.stringify(old[name]) !== JSON.stringify(newer[name])) show(name);
  const again = focus && document.getElementById(focus);
  if (again && again !== document.activeElement) {
    again.focus({ preventScroll: true });
    if (typeof caret === "number") again.setSelectionRange(caret, caret);
  }
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
