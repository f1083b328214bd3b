"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const OVERALL = "overall";
const SVG = "http://www.w3.org/2000/svg";

// everything that came from a submission goes into the page as text, never as markup
function make(tag, options = {}, ...children) {
  const node = options.svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "svg" || value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [name, work] of Object.entries(value)) node.addEventListener(name, work);
    else if (key === "text") node.textContent = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}
const svg = (tag, options = {}, ...children) => make(tag, { ...options, svg: true }, ...children);

const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(1));
const signed = (x) => (x > 0 ? "+" : "") + (100 * x).toFixed(1);
function bytes(x) {
  if (x === null || x === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (x >= 1024 && i < units.length - 1) { x /= 1024; i += 1; }
  return (i ? x.toFixed(1) : String(x)) + " " + units[i];
}
const decimal = (e) => 10 ** (((e % 3) + 3) % 3) + " " + ["B", "kB", "MB", "GB", "TB", "PB"][Math.floor(e / 3)];
function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 3600) return (seconds / 60).toFixed(1) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}
const mean = (values) => (values.length && values.every((v) => v !== null) ? values.reduce((a, b) => a + b, 0) / values.length : null);

// one row for each team, base and method that is on several boards; what is flagged adds to no score
const STATES = ["flagged", "reported", "re-scored", "re-run"];
function overall() {
  const groups = new Map();
  for (const row of DATA.rows) {
    const key = JSON.stringify([row.team, row.base, row.method]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return [...groups.values()].map((found) => {
    const first = found[0];
    const domains = [...new Set(found.map((r) => r.domain))];
    // what is said of one row holds for the whole; a fact in which they differ is none of the whole
    const said = (name) => [...new Set(found.flatMap((r) => r[name].map((t) => r.domain + ": " + t)))];
    const shared = (name, otherwise) => (found.every((r) => JSON.stringify(r[name]) === JSON.stringify(first[name])) ? first[name] : otherwise);
    const best = (mode) => domains.map((d) => Math.max(...found.filter((r) => r.domain === d && r.state !== "flagged" && r.scores[mode] !== null && r.scores[mode] !== undefined).map((r) => r.scores[mode])));
    const scores = {};
    for (const mode of DATA.modes) { const known = best(mode).filter(Number.isFinite); scores[mode] = known.length === DATA.domains.length ? mean(known) : null; }
    return { ...first, id: "o-" + first.id, domain: OVERALL, title: domains.length + " of " + DATA.domains.length + " domains", scores, strict: {}, valid: {},
      state: STATES.find((s) => found.some((r) => r.state === s)), reasons: said("reasons"), unranked: said("unranked"), remarks: said("remarks"),
      partition: shared("partition", "mixed"), protocol: shared("protocol", "mixed"), budget: shared("budget", "mixed"), privacy: found.every((r) => r.privacy) ? found.map((r) => r.privacy).reduce((a, b) => (b.epsilon > a.epsilon ? b : a)) : null, rank_r: shared("rank_r", null), dora: shared("dora", false),
      link: shared("link", ""), revision: shared("revision", ""), config: shared("config", ""), commit: shared("commit", ""), dirty: found.some((r) => r.dirty), seeds: shared("seeds", []), rounds: shared("rounds", null),
      lost: found.reduce((n, r) => n + (r.lost || 0), 0), trainable: shared("trainable", null), adapter: shared("adapter", null), peak: shared("peak", null), energy: mean(found.map((r) => r.energy)), seconds: mean(found.map((r) => r.seconds)),
      tasks: found.flatMap((r) => r.tasks.map((t) => ({ ...t, task: r.domain + ": " + t.task }))), bytes: mean(found.map((r) => r.bytes)), curve: [], losses: [] };
  });
}
const ROWS = [...DATA.rows, ...overall()];

const FILTERS = [
  ["size", "Base-model size", (r) => r.size], ["budget", "Communication", (r) => r.budget], ["base", "Base model", (r) => r.base],
  ["method", "Method", (r) => r.method], ["rank", "LoRA rank", (r) => (r.rank_r === null ? "unknown" : String(r.rank_r))],
  ["dp", "Privacy", (r) => (r.privacy ? "differential privacy" : "none")], ["split", "Heterogeneity", (r) => r.partition], ["state", "State", (r) => r.state],
];
const mainTasks = (row) => row.tasks.filter((t) => t.mode === state.mode);
const gain = (row) => {
  const known = mainTasks(row).filter((t) => t.base !== null && t.score !== null);
  return known.length && known.length === mainTasks(row).length ? mean(known.map((t) => t.score - t.base)) : null;
};
const COLUMNS = [
  ["rank", "Rank", true, (r) => rankOf(r)], ["team", "Who", false, (r) => r.team.toLowerCase()], ["base", "Base model", false, (r) => r.base.toLowerCase()],
  ["method", "Method", false, (r) => r.method], ["score", "Score, %", true, (r) => r.scores[state.mode]], ["gain", "Over base", true, gain],
  ["strict", "Strict", true, (r) => r.strict[state.mode]], ["valid", "Valid", true, (r) => r.valid[state.mode]], ["bytes", "Bytes", true, (r) => r.bytes],
  ["seconds", "Time", true, (r) => r.seconds], ["seeds", "Seeds", true, (r) => r.seeds.length], ["state", "State", false, (r) => r.state],
];

// state in the address: only values that exist are taken from it
const state = { board: DATA.domains[0], mode: DATA.modes.includes("likelihood") ? "likelihood" : DATA.modes[0], search: "", sort: "score", up: false, pair: [], filters: {} };
function options(key) {
  const read = FILTERS.find((f) => f[0] === key)[2];
  return [...new Set(ROWS.filter((r) => r.domain === state.board).map(read))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
}
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const known = (name, allowed, otherwise) => (allowed.includes(asked.get(name)) ? asked.get(name) : otherwise);
  state.board = known("board", [...DATA.domains, OVERALL], state.board);
  state.mode = known("mode", DATA.modes, state.mode);
  state.sort = known("sort", COLUMNS.map((c) => c[0]), "score");
  state.up = asked.get("up") === "1";
  state.search = (asked.get("search") || "").slice(0, 100);
  const ids = ROWS.map((r) => r.id);
  state.pair = (asked.get("pair") || "").split(",").filter((id) => ids.includes(id)).slice(0, 2);
  state.filters = {};
  for (const [key] of FILTERS) if (options(key).includes(asked.get(key))) state.filters[key] = asked.get(key);
}
function writeAddress() {
  const said = new URLSearchParams({ board: state.board, mode: state.mode });
  if (state.sort !== "score" || state.up) { said.set("sort", state.sort); if (state.up) said.set("up", "1"); }
  if (state.search) said.set("search", state.search);
  if (state.pair.length) said.set("pair", state.pair.join(","));
  for (const [key, value] of Object.entries(state.filters)) said.set(key, value);
  history.replaceState(null, "", "#" + said.toString());
}

const rankOf = (row) => { const table = DATA.ranks[row.domain + "/" + state.mode] || {}; return row.id in table ? table[row.id] : null; };
function shown() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = ROWS.filter((row) => row.domain === state.board
    && FILTERS.every(([key, , read]) => !(key in state.filters) || read(row) === state.filters[key])
    && words.every((w) => (row.team + " " + row.title + " " + row.base + " " + row.method).toLowerCase().includes(w)));
  const value = COLUMNS.find((c) => c[0] === state.sort)[3];
  const keyed = found.map((row) => [value(row), row]);
  const sign = state.up ? 1 : -1;
  keyed.sort(([a], [b]) => {
    if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1;
    if (b === null || b === undefined) return -1;
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  });
  return keyed.map(([, row]) => row);
}

function change(work) { work(); writeAddress(); draw(); }

function drawTabs() {
  const names = [...DATA.domains, OVERALL];
  document.getElementById("tabs").replaceChildren(...names.map((name) => make("li", {}, make("button", {
    type: "button", text: name, "aria-current": name === state.board ? "page" : null, id: "tab-" + name,
    on: { click: () => { change(() => { state.board = name; state.filters = {}; state.pair = []; }); document.getElementById("tab-" + name).focus(); } },
  }))));
}
function choice(name, label, values, current, all, set) {
  const select = make("select", { id: "filter-" + name, on: { change: (event) => { change(() => set(event.target.value)); document.getElementById("filter-" + name).focus(); } } },
    ...(all ? [make("option", { value: "", text: "all" })] : []),
    ...values.map((v) => make("option", { value: v, text: v, selected: v === current })));
  return make("label", { for: "filter-" + name }, label, select);
}
function drawControls() {
  const box = document.getElementById("controls");
  const search = make("input", { id: "search", type: "search", value: state.search, placeholder: "team, model, method", on: { input: (e) => { state.search = e.target.value; writeAddress(); drawTable(); drawPareto(); } } });
  box.replaceChildren(
    make("label", { for: "search" }, "Search", search),
    choice("mode", "Evaluation", DATA.modes, state.mode, false, (v) => { state.mode = v; }),
    ...FILTERS.map(([key, label]) => [key, label, options(key)]).filter(([, , values]) => values.length > 1).map(([key, label, values]) =>
      choice(key, label, values, state.filters[key], true, (v) => { if (v) state.filters[key] = v; else delete state.filters[key]; })),
    make("button", { type: "button", id: "reset", text: "Reset", on: { click: () => { change(() => { state.filters = {}; state.search = ""; state.pair = []; state.sort = "score"; state.up = false; }); document.getElementById("reset").focus(); } } }),
    make("button", { type: "button", id: "csv", text: "CSV", on: { click: () => save("board.csv", "text/csv", csv()) } }),
    make("button", { type: "button", id: "json", text: "JSON", on: { click: () => save("board-rows.json", "application/json", JSON.stringify(shown(), null, 1)) } }),
  );
}

function drawHead() {
  const cells = COLUMNS.map(([key, label, number]) => make("th", { scope: "col", class: number ? "number" : null, "aria-sort": state.sort === key ? (state.up ? "ascending" : "descending") : null },
    make("button", { type: "button", id: "sort-" + key, text: label + (state.sort === key ? (state.up ? " ▲" : " ▼") : ""), on: { click: () => {
      change(() => { if (state.sort === key) state.up = !state.up; else { state.sort = key; state.up = !number || key === "rank" || key === "bytes" || key === "seconds"; } });
      document.getElementById("sort-" + key).focus();
    } } })));
  document.querySelector("#board thead").replaceChildren(make("tr", {}, make("th", { scope: "col", text: "Compare" }), ...cells));
}
const cell = (label, options = {}, ...children) => make("td", { "data-label": label, ...options }, ...children);
function hint(row) {
  return mainTasks(row).map((t) => t.task + ": " + percent(t.score) + (t.low === null ? "" : " (" + percent(t.low) + "–" + percent(t.high) + ")")
    + (t.base === null ? "" : ", base " + percent(t.base) + ", delta " + signed(t.score - t.base)) + (t.chance === undefined || t.chance === null ? "" : ", majority class " + percent(t.chance))
    + (t.claimed === null || t.claimed === undefined ? "" : ", published as " + percent(t.claimed))).join("\n");
}
function interval(row) {
  const known = mainTasks(row).filter((t) => t.low !== null);
  if (!known.length || row.scores[state.mode] === null) return "";
  return " ± " + (100 * Math.sqrt(known.reduce((sum, t) => sum + ((t.high - t.low) / 2) ** 2, 0)) / known.length).toFixed(1);
}
function line(row) {
  const better = gain(row), rank = rankOf(row), tip = hint(row);
  const box = make("input", { type: "checkbox", "aria-label": "compare " + (row.team || row.base), checked: state.pair.includes(row.id), on: { change: (event) => change(() => {
    state.pair = event.target.checked ? [...state.pair, row.id].slice(-2) : state.pair.filter((id) => id !== row.id);
  }) } });
  const more = make("button", { type: "button", "aria-expanded": "false", text: row.team || "–", on: { click: (event) => toggle(event.currentTarget, row) } });
  return make("tr", { id: "row-" + row.id },
    cell("Compare", {}, box), cell("Rank", { class: "number", text: rank === null ? "–" : String(rank), title: rank === null ? (row.unranked.join("\n") || row.state) : null }),
    cell("Who", {}, make("span", {}, more, row.title ? make("small", { text: " " + row.title }) : null)), cell("Base model", { text: row.base }), cell("Method", { text: row.method }),
    cell("Score, %", { class: "number", title: tip }, make("span", {}, percent(row.scores[state.mode]), make("small", { text: interval(row) }))),
    cell("Over base", { title: tip, class: "number" + (better === null ? "" : better > 0 ? " better" : " worse"), text: better === null ? "–" : signed(better) }),
    cell("Strict", { title: tip, class: "number", text: percent(row.strict[state.mode]) }), cell("Valid", { title: tip, class: "number", text: percent(row.valid[state.mode]) }),
    cell("Bytes", { class: "number", text: bytes(row.bytes) }), cell("Time", { class: "number", text: span(row.seconds) }), cell("Seeds", { class: "number", text: String(row.seeds.length || "–") }),
    cell("State", {}, make("span", { class: "state " + row.state, text: row.state, title: row.reasons.join("\n") || null })));
}
function toggle(button, row) {
  const tr = button.closest("tr"), open = button.getAttribute("aria-expanded") === "true";
  if (open) tr.nextElementSibling.remove();
  else tr.after(make("tr", { class: "more" }, make("td", { colspan: COLUMNS.length + 1 }, details(row))));
  button.setAttribute("aria-expanded", String(!open));
}
// an array is shown as a list, where it has more than one text
const list = (texts) => (texts.length > 1 ? make("ul", {}, ...texts.map((text) => make("li", { text }))) : texts[0]);
function facts(pairs) {
  const known = pairs.map(([k, v]) => [k, Array.isArray(v) ? list(v) : v]).filter(([, v]) => v !== null && v !== undefined && v !== "");
  return make("dl", {}, ...known.flatMap(([k, v]) => [make("dt", { text: k }), make("dd", {}, v instanceof Node ? v : String(v))]));
}
function details(row) {
  const link = row.link ? make("a", { href: row.link, rel: "noopener nofollow", text: row.link }) : null;
  const worst = row.tasks.filter((t) => t.clients && t.clients.length).map((t) => t.task + ": " + percent(Math.min(...t.clients)) + " to " + percent(Math.max(...t.clients)));
  return make("div", { class: "parts" },
    bars([row]),
    facts([["link", link], ["why", row.reasons], ["not ranked", row.unranked], ["notes", row.remarks], ["revision", row.revision], ["protocol", row.protocol], ["partition", row.partition], ["LoRA rank", row.rank_r], ["DoRA", row.dora ? "yes" : null],
      ["privacy", row.privacy ? "epsilon " + row.privacy.epsilon + ", delta " + row.privacy.delta + " (" + row.privacy.unit + ")" : "none"], ["seeds", row.seeds.join(", ")], ["spread over seeds", mainTasks(row).filter((t) => t.spread !== null).map((t) => t.task + ": ± " + (100 * t.spread).toFixed(1))], ["rounds", row.rounds || null], ["lost replies", row.lost || null],
      ["trainable parameters", row.trainable], ["adapter", row.adapter ? bytes(row.adapter) : null], ["peak memory", row.peak ? bytes(row.peak) : null], ["energy", row.energy ? (row.energy / 3.6e6).toFixed(3) + " kWh" : null],
      ["clients, worst to best", worst], ["recipe", String(row.config).slice(0, 16)], ["commit", row.commit ? String(row.commit).slice(0, 12) + (row.dirty ? " (changed)" : "") : null]]),
    row.losses.length > 1 ? curve("training loss by round", row.losses.map((y, i) => [i + 1, y])) : null,
    ...[...new Set(row.curve.map((p) => p.task + " (" + p.mode + ")"))].map((name) => curve(name + " by round", row.curve.filter((p) => p.task + " (" + p.mode + ")" === name).map((p) => [p.round, p.score]))));
}

function curve(title, points) {
  const known = points.filter(([, y]) => y !== null), w = 320, h = 140;
  const xs = known.map((p) => p[0]), ys = known.map((p) => p[1]), low = Math.min(...ys), high = Math.max(...ys), left = Math.min(...xs), right = Math.max(...xs);
  const x = (v) => 40 + (w - 50) * (right > left ? (v - left) / (right - left) : 0.5), y = (v) => h - 25 - (h - 45) * (high > low ? (v - low) / (high - low) : 0.5);
  return svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, height: h, role: "img", "aria-label": title + ": " + known.map((p) => p[0] + ": " + p[1].toFixed(3)).join(", ") },
    svg("text", { x: 4, y: 12, text: title }), svg("text", { x: 2, y: y(high) + 4, text: high.toFixed(2) }), svg("text", { x: 2, y: y(low) + 4, text: low.toFixed(2) }),
    svg("path", { class: "line", d: known.map((p, i) => (i ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("") }));
}
function bars(rows) {
  const names = [...new Set(rows.flatMap((r) => r.tasks.map((t) => t.task + " (" + t.mode + ")")))];
  const of = (row, name) => row.tasks.find((t) => t.task + " (" + t.mode + ")" === name && t.averaged);
  const used = names.filter((n) => rows.some((r) => of(r, n))), step = 14 * rows.length + 22, w = 430, h = used.length * step + 6;
  const parts = used.flatMap((name, i) => [svg("text", { x: 0, y: i * step + 12, text: name }), ...rows.flatMap((row, j) => {
    const t = of(row, name), top = i * step + 16 + 14 * j;
    if (!t || t.score === null) return [];
    const size = 330 * Math.max(0, Math.min(1, t.score)), marks = [[t.base, "base model"], [t.chance, "majority class"]].filter(([v]) => v !== null && v !== undefined);
    return [svg("rect", { class: j ? "two" : "one", x: 0, y: top, width: size, height: 11 }, svg("title", { text: hintTask(t) })), svg("text", { x: size + 5, y: top + 10, text: percent(t.score) }),
      ...marks.map(([v, label]) => svg("line", { x1: 330 * v, x2: 330 * v, y1: top - 1, y2: top + 12, stroke: "currentColor", "stroke-dasharray": label === "base model" ? null : "2 2" }, svg("title", { text: label + " " + percent(v) })))];
  })]);
  const said = used.map((n) => n + ": " + rows.map((r) => percent(of(r, n) ? of(r, n).score : null)).join(" and ")).join("; ");
  return svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, height: h, role: "img", "aria-label": "scores by task: " + said }, ...parts);
}
const hintTask = (t) => t.task + " " + percent(t.score) + ", n " + t.n + (t.base === null ? "" : ", base model " + percent(t.base));

// for each seed which items were right: one array of 0 and 1 a seed
function flags(task) {
  return task.bits.map((bits) => { const raw = atob(bits), out = new Uint8Array(task.n); for (let i = 0; i < task.n; i += 1) out[i] = (raw.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1; return out; });
}
// the same numbers at every look: a generator of its own (mulberry32)
function drawer(seed) {
  return () => { seed = (seed + 0x6d2b79f5) | 0; let t = Math.imul(seed ^ (seed >>> 15), 1 | seed); t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t; return ((t ^ (t >>> 14)) >>> 0) / 4294967296; };
}
// paired bootstrap over items and seeds: how often each is right, and the 95 % interval of second minus first
function paired(one, two) {
  const x = flags(one), y = flags(two), n = one.n, draw = drawer(1), draws = [];
  const right = (seeds, i) => seeds.reduce((sum, seed) => sum + seed[i], 0) / seeds.length;
  let first = 0, second = 0;
  for (let i = 0; i < n; i += 1) { const gap = right(x, i) - right(y, i); if (gap > 1e-12) first += 1; if (gap < -1e-12) second += 1; }
  const pick = (seeds) => seeds.map(() => seeds[Math.floor(draw() * seeds.length)]);
  for (let k = 0; k < 1000; k += 1) {
    const a = pick(x), b = pick(y);
    let sum = 0;
    for (let j = 0; j < n; j += 1) { const i = Math.floor(draw() * n); for (const seed of a) sum -= seed[i] / a.length; for (const seed of b) sum += seed[i] / b.length; }
    draws.push(sum / n);
  }
  draws.sort((a, b) => a - b);
  return { first, second, low: draws[25], high: draws[974] };
}
function drawCompare() {
  const box = document.getElementById("compare"), rows = state.pair.map((id) => ROWS.find((r) => r.id === id));
  box.hidden = rows.length !== 2;
  if (box.hidden) return;
  const [one, two] = rows;
  const lines = one.tasks.map((a) => [a, two.tasks.find((b) => b.task === a.task && b.mode === a.mode)]).filter(([a, b]) => b && a.score !== null && b.score !== null).map(([a, b]) => {
    let verdict = "no samples of the same items to pair";
    if (a.bits && b.bits && a.items === b.items && a.n === b.n) {
      const found = paired(a, b);
      verdict = found.first + " items the first has right more often, " + found.second + " the second; difference (95 %) " + signed(found.low) + " to " + signed(found.high);
    }
    return make("tr", {}, cell("Task", { text: a.task + " (" + a.mode + ")" }), cell("First", { class: "number", text: percent(a.score) }), cell("Second", { class: "number", text: percent(b.score) }), cell("Difference", { class: "number", text: signed(b.score - a.score) }), cell("Paired test", { text: verdict }));
  });
  const name = (r) => (r.team ? r.team + ", " : "") + r.base + ", " + r.method;
  document.getElementById("compare-body").replaceChildren(
    make("p", { text: "First: " + name(one) + ". Second: " + name(two) + "." }), bars(rows),
    make("table", {}, make("thead", {}, make("tr", {}, ...["Task", "First", "Second", "Difference", "Paired test"].map((t) => make("th", { scope: "col", text: t })))), make("tbody", {}, ...lines)));
}

function drawPareto() {
  const rows = shown().filter((r) => r.bytes && r.scores[state.mode] !== null && r.scores[state.mode] !== undefined), box = document.getElementById("pareto");
  if (!rows.length) { box.replaceChildren(make("p", { class: "note", text: "No row here says how many bytes it took." })); return; }
  const w = 760, h = 320, xs = rows.map((r) => Math.log10(r.bytes)), ys = rows.map((r) => r.scores[state.mode]);
  const [x0, x1, y0, y1] = [Math.floor(Math.min(...xs)), Math.ceil(Math.max(...xs) + 1e-9), Math.min(...ys), Math.max(...ys)];
  const x = (v) => 60 + (w - 80) * (v - x0) / Math.max(1, x1 - x0), y = (v) => h - 40 - (h - 60) * (y1 > y0 ? (v - y0) / (y1 - y0) : 0.5);
  const order = rows.map((r, i) => i).sort((a, b) => xs[a] - xs[b] || ys[b] - ys[a]);
  let best = -Infinity;
  const front = new Set();
  for (const i of order) if (ys[i] > best) { best = ys[i]; front.add(i); }
  const ticks = [];
  for (let e = x0; e <= x1; e += 1) ticks.push(svg("line", { class: "axis", x1: x(e), x2: x(e), y1: 15, y2: h - 40 }), svg("text", { x: x(e), y: h - 22, "text-anchor": "middle", text: decimal(e) }));
  const say = (r) => (r.team || r.base) + ", " + r.method + ": " + percent(r.scores[state.mode]) + " % for " + bytes(r.bytes);
  const points = rows.map((r, i) => svg("circle", { class: "point" + (front.has(i) ? "" : " dominated"), cx: x(xs[i]), cy: y(ys[i]), r: front.has(i) ? 6 : 4, on: { click: () => show(r) } }, svg("title", { text: say(r) })));
  const label = "Score against bytes; on the front: " + [...front].map((i) => say(rows[i])).join("; ");
  box.replaceChildren(svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w, height: h, role: "img", "aria-label": label }, ...ticks,
    svg("text", { x: 4, y: y(y1) + 4, text: percent(y1) + " %" }), svg("text", { x: 4, y: y(y0) + 4, text: percent(y0) + " %" }), svg("text", { x: w / 2, y: h - 4, "text-anchor": "middle", text: "bytes on the wire, both directions" }),
    svg("path", { class: "line", d: order.filter((i) => front.has(i)).map((i, j) => (j ? "L" : "M") + x(xs[i]).toFixed(1) + " " + y(ys[i]).toFixed(1)).join("") }), ...points));
}
function show(row) { const tr = document.getElementById("row-" + row.id); tr.scrollIntoView({ block: "center" }); tr.querySelector("button").focus(); }

function csv() {
  const quote = (v) => { const t = v === null || v === undefined ? "" : String(v); const safe = /^[=+\-@\t\r]/.test(t) && Number.isNaN(Number(t)) ? "'" + t : t; return '"' + safe.replaceAll('"', '""') + '"'; };
  const head = ["rank", "team", "title", "domain", "base", "revision", "method", "mode", "score", "strict", "valid", "gain", "bytes", "seconds", "seeds", "state", "recipe"];
  const lines = shown().map((r) => [rankOf(r), r.team, r.title, r.domain, r.base, r.revision, r.method, state.mode, r.scores[state.mode], r.strict[state.mode], r.valid[state.mode], gain(r), r.bytes, r.seconds, r.seeds.join(" "), r.state, r.config]);
  return [head, ...lines].map((l) => l.map(quote).join(",")).join("\r\n") + "\r\n";
}
function save(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = make("a", { href: address, download: name });
  document.body.append(link); link.click(); link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function drawTable() {
  const rows = shown();
  document.querySelector("#board tbody").replaceChildren(...rows.map(line));
  document.getElementById("status").textContent = rows.length + " of " + ROWS.filter((r) => r.domain === state.board).length + " rows on the " + state.board + " board";
}
function draw() { drawTabs(); drawControls(); drawHead(); drawTable(); drawCompare(); drawPareto(); }
document.getElementById("made").textContent = "Made by " + DATA.made_by + " from " + DATA.entries + " entries, store " + DATA.store_sha256.slice(0, 16) + ". Anyone can build this page again from them.";
if (DATA.left_out && DATA.left_out.length) document.getElementById("made").after(make("ul", {}, ...DATA.left_out.map((text) => make("li", { text }))));
document.getElementById("empty").hidden = DATA.rows.length > 0;
if (DATA.rows.length) { readAddress(); draw(); addEventListener("hashchange", () => { readAddress(); draw(); }); }
else for (const part of document.querySelectorAll("main > section:not(#empty), main > #status, .skip, nav")) part.hidden = true;
})();
