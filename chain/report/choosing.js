// Which questions the filters let through, and in which order.

const has = (value) => value !== null && value !== undefined;

// How rows can be sorted: by a number of the row and of its shown answer; without one, a row comes last.
const SORTS = {
  tokens: ["tokens", (row, answer) => answer.tokens],
  reward: ["reward", (row, answer) => answer.reward],
  advantage: ["advantage", (row, answer) => answer.advantage],
  right: ["share that is right", (row) => row.answers.filter((one) => one.right).length / row.answers.length],
  flips: ["changes of the verdict", (row) => row.answers.filter((one) => flipped(row, one, "")).length],
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

// The answers of a row that the filters let through.
function passing(row, filter) {
  if (filter.set && row.set !== filter.set || filter.source && row.source !== filter.source) return [];
  const stage = filter.stage || row.answers.at(-1).stage, words = filter.search.toLowerCase();
  const inRow = !words || `${row.id}\n${row.question}\n${row.gold}`.toLowerCase().includes(words);
  const wanted = { right: true, wrong: false, unscored: null };
  return row.answers.filter((answer) => {
    const change = filter.flip && flipped(row, answer, filter.base);
    return (stage === "any" || answer.stage === stage)
      && (!filter.judge || rightBy(answer, filter.judge) !== undefined)
      && (!filter.verdict || rightBy(answer, filter.judge) === wanted[filter.verdict])
      && (!filter.flip || (filter.flip === "changed" ? change : change === filter.flip))
      && (!filter.cut || answer.cut)
      && (inRow || answer.text.toLowerCase().includes(words));
  });
}

// [row, shown answer] of every row that the filters let through, in order. The order also picks the shown answer.
function selection(rows, filter) {
  const found = rows.map((row) => [row, passing(row, filter)]).filter(([, answers]) => answers.length);
  const key = filter.sort.replace(/^-/, ""), sign = filter.sort.startsWith("-") ? -1 : 1;
  const sort = Object.hasOwn(SORTS, key) && SORTS[key];
  if (!sort) return found.map(([row, answers]) => [row, answers[0]]);
  const rank = (row, answer) => {
    const value = sort[1](row, answer);
    return has(value) ? sign * value : Infinity;
  };
  const best = found.map(([row, answers]) =>
    answers.map((answer) => [row, answer, rank(row, answer)]).reduce((a, b) => (b[2] < a[2] ? b : a)));
  return best.sort((a, b) => (a[2] < b[2] ? -1 : a[2] > b[2] ? 1 : 0));
}
