// The case browser. Data is only ever set as text: documents may hold anything.
"use strict";
(() => {
  const sets = JSON.parse(document.getElementById("case-data").textContent);
  const at = (name) => document.getElementById(name);
  const list = at("case-list"), detail = at("case-detail");
  const filters = Object.fromEntries(["text", "set", "system", "outcome", "k", "kind", "disagree"].map((name) => [name, at(`filter-${name}`)]));
  const RIGHT = 0.5;
  const [ANSWER, SCORE, CHOSEN, ERROR, SHOWN] = [0, 1, 2, 3, 4]; // of a system's run of a question

  // A case is named by its id; by its set too, where an earlier set has the same id.
  const cases = new Map();
  sets.forEach((set, number) => set.cases.forEach((one) => {
    one.set = number;
    one.key = cases.has(one.id) ? `${set.name}/${one.id}` : one.id;
    cases.set(one.key, one);
  }));
  let found = [], current = null, pressed = null; // the button that moved on keeps the focus

  const make = (tag, properties, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name.includes("-")) made.setAttribute(name, value); else made[name] = value;
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const fill = (select, entries, value) => {
    select.replaceChildren(...entries.map(([name, shown]) => make("option", { value: name }, shown)));
    if (entries.some(([name]) => name === value)) select.value = value;
  };
  const link = (one) => `#case-${encodeURIComponent(one.key)}`;
  const system = () => Number(filters.system.value);
  const outcome = (run) => run[ANSWER] === null ? "unanswered" : run[SCORE] >= RIGHT ? "right" : "wrong";
  const mark = (one, run) => {
    const kind = outcome(run);
    const shown = kind === "unanswered" ? "no answer" : one.graded ? run[SCORE].toFixed(2) : kind === "right" ? "✓ right" : "✗ wrong";
    return make("span", { className: kind === "right" ? "right" : "wrong" }, shown);
  };
  const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");
  const documentsOf = (run) => run[ANSWER] === null ? "" : run[CHOSEN].length ? run[CHOSEN].map((position) => `[${position}]`).join(", ") : "none";

  function openSet(number, chosen) {
    const set = sets[number], runs = set.cases.flatMap((one) => one.runs.map((run) => run[CHOSEN].length));
    filters.set.value = String(number);
    fill(filters.system, set.systems.map((name, place) => [String(place), name]), String(chosen ?? set.reference));
    fill(filters.kind, [["", "any"], ...[...new Set(set.cases.map((one) => one.kind))].sort().map((kind) => [kind, kind])], filters.kind.value);
    fill(filters.k, [["", "any"], ...[...new Set(runs)].sort((a, b) => a - b).map((k) => [String(k), String(k)])], filters.k.value);
  }

  function searched(one) {
    one.words ??= [one.id, one.question, ...one.answers, ...one.runs.map((run) => run[ANSWER] ?? ""),
      ...one.docs.flatMap(([, number]) => sets[one.set].documents[number])].join("\n").toLowerCase();
    return one.words;
  }

  function passes(one) {
    const run = one.runs[system()], sides = one.runs.map(outcome);
    return searched(one).includes(filters.text.value.trim().toLowerCase())
      && (!filters.outcome.value || outcome(run) === filters.outcome.value)
      && (!filters.k.value || (run[ANSWER] !== null && run[CHOSEN].length === Number(filters.k.value)))
      && (!filters.kind.value || one.kind === filters.kind.value)
      && (!filters.disagree.checked || (sides.includes("right") && sides.some((side) => side !== "right")));
  }

  function showList() {
    const set = sets[Number(filters.set.value)];
    found = set.cases.filter(passes);
    at("case-count").textContent = `${found.length} of ${set.cases.length} questions`;
    list.replaceChildren(...found.map((one) => {
      const run = one.runs[system()];
      const k = run[ANSWER] === null ? null : make("span", {}, `k = ${run[CHOSEN].length}`);
      const entry = make("a", { href: link(one) }, one.question, make("span", { className: "meta" }, mark(one, run), make("span", {}, one.kind), k));
      if (one === current) entry.setAttribute("aria-current", "true");
      return make("li", {}, entry);
    }));
  }

  // The text with every gold answer in it marked.
  function marked(text, answers) {
    const parts = [], lower = text.toLowerCase(), wanted = answers.map((answer) => answer.trim().toLowerCase()).filter((answer) => answer.length > 1);
    let start = 0;
    while (wanted.length && lower.length === text.length) {
      const hits = wanted.map((answer) => [lower.indexOf(answer, start), answer.length]).filter(([place]) => place >= 0);
      if (!hits.length) break;
      const [place, length] = hits.reduce((best, hit) => hit[0] < best[0] || (hit[0] === best[0] && hit[1] > best[1]) ? hit : best);
      parts.push(text.slice(start, place), make("mark", {}, text.slice(place, place + length)));
      start = place + length;
    }
    return [...parts, text.slice(start)];
  }

  function documentEntry(one, [position, number], run) {
    const [title, text] = sets[one.set].documents[number], rank = run[CHOSEN].indexOf(position) + 1, unseen = position > run[SHOWN];
    const tag = (name, shown) => make("span", { className: `tag ${name}` }, shown);
    return make("li", { className: `${rank ? "chosen" : ""} ${unseen ? "unseen" : ""}` },
      make("span", { className: "position" }, `[${position}]`), make("span", { className: "title" }, title || "(no title)"),
      one.gold.includes(position) ? tag("gold", "gold") : null, rank ? tag("rank", `chosen ${ordinal(rank)}`) : null,
      unseen ? tag("none", "not shown to the model") : null, make("p", {}, ...marked(text, one.answers)));
  }

  function runLine(one, run, place) {
    const pick = make("button", { type: "button", "aria-pressed": String(place === system()) }, sets[one.set].systems[place]);
    pick.addEventListener("click", () => { filters.system.value = String(place); showList(); showCase(); detail.querySelector("[aria-pressed=true]").focus(); });
    return make("tr", { className: place === system() ? "chosen-system" : "" }, make("td", {}, pick),
      make("td", {}, run[ANSWER] ?? run[ERROR]), make("td", { className: "range" }, mark(one, run)), make("td", {}, documentsOf(run)));
  }

  function showCase() {
    if (!current) { detail.replaceChildren(make("p", { className: "count" }, "No question fits these filters.")); return; }
    const one = current, run = one.runs[system()], place = found.indexOf(one);
    const step = (name, by) => {
      const to = place < 0 ? found[0] : found[place + by], button = make("button", { type: "button", name, disabled: !to }, name);
      button.addEventListener("click", () => { pressed = name; location.hash = link(to); });
      return button;
    };
    const needed = one.needed === null ? "" : `, needs ${one.needed} ${one.needed === 1 ? "document" : "documents"}`;
    const headings = ["system", "answer", "score", "documents"].map((name) => make("th", { scope: "col" }, name));
    detail.replaceChildren(make("div", {},
      make("div", { className: "bar" }, make("span", {}, `${one.id} · ${one.kind}${needed}`), make("span", {}, step("Previous", -1), " ", step("Next", 1))),
      make("h3", { tabIndex: -1 }, one.question),
      make("h4", {}, one.answers.length > 1 ? "Gold answers" : "Gold answer"),
      make("ul", { className: "answers" }, ...one.answers.map((answer) => make("li", {}, answer))),
      make("h4", {}, "Systems"),
      make("div", { className: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...headings)), make("tbody", {}, ...one.runs.map((each, number) => runLine(one, each, number))))),
      make("h4", {}, `Documents as retrieved; chosen ones of ${sets[one.set].systems[system()]}`),
      make("ol", { className: "docs" }, ...one.docs.map((doc) => documentEntry(one, doc, run))),
      one.more ? make("p", { className: "count" }, `${one.more} more documents that are neither gold nor chosen.`) : null,
      one.lacking.length ? make("p", { className: "count" }, `Gold, but not retrieved: ${one.lacking.join(", ")}`) : null,
    ));
  }

  function open(one) {
    if (one.set !== Number(filters.set.value)) openSet(one.set);
    current = one;
    showList();
    showCase();
    list.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  function openHash() {
    const match = location.hash.match(/^#case-(.*)$/);
    let one;
    try { one = match && cases.get(decodeURIComponent(match[1])); } catch { one = null; }
    if (!one) return false;
    open(one);
    (detail.querySelector(`button[name=${pressed}]:enabled`) ?? detail.querySelector("h3")).focus({ preventScroll: true });
    pressed = null;
    const top = detail.getBoundingClientRect().top;
    if (top < 0 || top > 0.6 * innerHeight) detail.scrollIntoView();
    return true;
  }

  function refresh() {
    showList();
    if (!found.includes(current)) { current = found[0] ?? null; showList(); }
    showCase();
  }

  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key], links = [...list.querySelectorAll("a")];
    if (by) { event.preventDefault(); links[links.indexOf(document.activeElement) + by]?.focus(); }
  });
  detail.addEventListener("keydown", (event) => { if (event.key === "Escape") list.querySelector("[aria-current]")?.focus(); });
  at("case-filters").addEventListener("submit", (event) => event.preventDefault());
  at("case-filters").addEventListener("input", (event) => { if (event.target === filters.set) openSet(Number(filters.set.value)); refresh(); });
  window.addEventListener("hashchange", openHash);

  fill(filters.set, sets.map((set, number) => [String(number), set.name]), "0");
  openSet(0);
  if (!openHash()) refresh();
})();
