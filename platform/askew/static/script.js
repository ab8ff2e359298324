// The search page. It asks the endpoint's own paths, and writes what comes back as text, never as markup.

const HITS = 24, VALUES = 12, PAUSE_MS = 120, RELEASE_EVERY_MS = 2000, FIELDS_SHOWN = 4;
const $ = (id) => document.getElementById(id);
const state = { query: "", like: null, filters: {}, weight: null, sides: ["fused"] };
let release = null, searching = null, counting = null;

// --- what is asked ------------------------------------------------------------------------------

class Refused extends Error {}

// The key, where the endpoint wants one, stays in this tab, and goes nowhere but into the header of its requests.
const KEY = "askew key";
const keyed = () => (sessionStorage.getItem(KEY) ? { authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {});

async function ask(path, body, signal) {
  let answer;
  try {
    const how = body && { method: "POST", body: JSON.stringify(body) };
    const headers = { ...(body && { "content-type": "application/json" }), ...keyed() };
    answer = await fetch(path, { ...how, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The endpoint does not answer. Is it up?");
  }
  if ([401, 403].includes(answer.status)) $("keyed").hidden = false;
  const found = await answer.json().catch(() => null);
  if (answer.ok && found) return found;
  const { message, hint } = found?.error ?? { message: `The endpoint answered ${answer.status}.`, hint: "" };
  throw new Refused(`${message}. ${hint}`);
}

function conditions(without) {
  const filter = {};
  for (const [field, wanted] of Object.entries(state.filters)) {
    if (field === without) continue;
    if (wanted instanceof Set) filter[field] = [...wanted];
    else filter[field] = wanted;
  }
  return Object.keys(filter).length ? filter : null;
}

const WEIGHTS = { text: 0, photo: 1 };
const weighs = (side) => side in WEIGHTS || state.weight !== null;

// A side is "fused", "text" or "photo" of the live version, or the number of another version that is held.
function wanted(side, more) {
  const body = { k: HITS, filter: conditions(), ...more };
  if (/^v/.test(side)) body.version = side.slice(1);
  if (state.like) return ["similar", { ...body, item_id: state.like.item_id }];
  if (weighs(side)) body.image_weight = WEIGHTS[side] ?? state.weight;
  return ["search", { ...body, query: state.query }];
}

// --- searching ----------------------------------------------------------------------------------

async function search() {
  searching?.abort();
  const { signal } = (searching = new AbortController());
  save();
  show($("error"), "");
  if (!state.query && !state.like) {
    $("panels").replaceChildren();
    say("Type what you are looking for. The filters tell what there is.");
    return;
  }
  const started = performance.now();
  try {
    const answers = await Promise.all(state.sides.map((side) => ask(...wanted(side), signal)));
    draw(answers);
    tell(answers, performance.now() - started);
    if (!state.like) await explain(answers, signal);
  } catch (error) {
    if (error.name !== "AbortError") show($("error"), error.message);
  }
}

// The scores' parts take longer than the hits, which are shown before them.
async function explain(answers, signal) {
  await Promise.all(answers.map(async (answer, place) => {
    let hits = answer.hits;
    try {
      if (!hits[0]?.explanation) hits = (await ask(...wanted(state.sides[place], { explain: true }), signal)).hits;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return; // a slow encoder of photos: the hits stand without their parts
    }
    const panel = $("panels").children[place];
    for (const hit of hits) {
      const card = panel?.querySelector(`article[data-id="${CSS.escape(hit.item_id)}"]`);
      if (card && hit.explanation) card.querySelector(".parts").replaceChildren(bars(hit, !weighs(state.sides[place])));
    }
  }));
}

function tell(answers, ms) {
  const [first, second] = answers;
  const of = state.like ? `like “${state.like.title}”` : `for “${state.query}”`;
  let told = `${first.hits.length} products ${of} in ${ms.toFixed(0)} ms, of which the endpoint took ${first.took_ms.toFixed(0)}.`;
  if (second) {
    const ids = new Set(first.hits.map((hit) => hit.item_id));
    const same = second.hits.filter((hit) => ids.has(hit.item_id)).length;
    told = `${same} of ${second.hits.length} products ${of} are on both sides; the others have a broken border.`;
  }
  say(first.hits.length ? told : `No product ${of} passes the filters.`);
  const worst = answers.find((answer) => answer.degraded);
  show($("banner"), worst ? incomplete(worst.coverage) : "");
}

function incomplete({ shards, answered, missing }) {
  const percent = (100 * missing).toFixed(missing < 0.1 ? 1 : 0);
  return `These results are incomplete: ${shards - answered} of ${shards} shards did not answer, which hold ${percent} % of the catalogue.`;
}

// --- drawing ------------------------------------------------------------------------------------

function draw(answers) {
  const panels = $("panels"), two = answers.length > 1;
  panels.classList.toggle("two", two);
  const ids = answers.map((answer) => new Set(answer.hits.map((hit) => hit.item_id)));
  panels.replaceChildren(...answers.map((answer, place) => {
    const panel = $("panel").content.cloneNode(true).firstElementChild;
    choices(panel.querySelector("select"), place);
    panel.querySelector(".told").textContent = `version ${answer.model.version}, ${answer.took_ms.toFixed(0)} ms`;
    const cards = answer.hits.map((hit) => card(hit, two && !ids[1 - place].has(hit.item_id)));
    panel.querySelector(".hits").replaceChildren(...cards);
    return panel;
  }));
}

function choices(select, place) {
  const live = release?.model.version ?? "";
  const sides = [["fused", `version ${live}, live`], ["text", `version ${live}, its best in the order of texts`], ["photo", `version ${live}, its best in the order of photos`]];
  for (const version of release?.held ?? []) if (version !== live) sides.push([`v${version}`, `version ${version}, in memory`]);
  select.replaceChildren(...sides.map(([value, text]) => new Option(text, value, false, value === state.sides[place])));
  select.addEventListener("change", () => { state.sides[place] = select.value; search(); });
}

function card(hit, only) {
  const item = $("hit").content.cloneNode(true).firstElementChild;
  item.classList.toggle("only", only);
  item.querySelector("article").dataset.id = hit.item_id;
  item.querySelector("h3").textContent = hit.title;
  const { price, ...fields } = hit.fields;
  item.querySelector(".price").textContent = price == null ? "" : typeof price === "number" ? price.toFixed(2) : String(price);
  const shown = Object.entries(fields).filter(([, value]) => value != null && value !== "").slice(0, FIELDS_SHOWN);
  item.querySelector(".fields").replaceChildren(...shown.map(([name, value]) => {
    const part = made("li", typeof value === "boolean" ? `${value ? "" : "not "}${name}` : String(value));
    part.title = name;
    return part;
  }));
  item.querySelector("b").textContent = hit.score.toFixed(3);
  item.querySelector(".photo").append(photo(hit));
  const like = item.querySelector(".like");
  like.setAttribute("aria-label", `more like ${hit.title}`);
  like.addEventListener("click", () => { state.like = hit; $("query").value = ""; state.query = ""; search(); scrollTo(0, 0); });
  return item;
}

function photo(hit) {
  const image = new Image();
  image.alt = `Photo of ${hit.title}`;
  image.decoding = "async";
  image.addEventListener("error", () => image.replaceWith(made("span", "no photo")));
  const path = `items/${hit.item_id.split("/").map(encodeURIComponent).join("/")}/image`;
  if (sessionStorage.getItem(KEY)) fetched(image, path); else image.src = path;
  return image;
}

// An <img> sends no header: where a key is wanted, the photo is fetched with it, and shown from memory.
async function fetched(image, path) {
  const answer = await fetch(path, { headers: keyed() }).catch(() => null);
  const url = answer?.ok ? URL.createObjectURL(await answer.blob()) : "data:,";
  for (const event of ["load", "error"]) image.addEventListener(event, () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
}

// How near the query is to the product's text and to its photo, and what the photo adds to the score.
function bars(hit, fused) {
  const { text, image, without_image: without } = hit.explanation;
  const box = made("span");
  box.className = "bars";
  for (const [name, value, kind] of [["text", text, ""], ["photo", image, "photo-bar"]]) {
    if (value == null) continue;
    const bar = document.createElement("i"), full = document.createElement("i");
    bar.className = kind;
    full.style.width = `${Math.round(100 * Math.max(0, Math.min(1, value)))}%`;
    bar.append(full);
    box.append(made("span", name), bar, made("span", value.toFixed(2)));
  }
  const all = document.createDocumentFragment();
  all.append(box);
  const adds = hit.score - without;
  if (image != null && fused) all.append(made("span", `the photo ${adds < 0 ? "takes" : "adds"} ${Math.abs(adds).toFixed(2)}`));
  return all;
}

function made(tag, text = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

function say(text) { $("said").textContent = text; }

// --- filters ------------------------------------------------------------------------------------

// A field's counts are of the products that pass the other fields' filters.
async function count() {
  counting?.abort();
  const { signal } = (counting = new AbortController());
  const chosen = Object.keys(state.filters);
  try {
    const [all, ...others] = await Promise.all([undefined, ...chosen].map((field) =>
      ask("facets", { filter: conditions(field), limit: VALUES }, signal)));
    const fields = new Map(all.fields.map((field) => [field.name, field]));
    chosen.forEach((name, place) => fields.set(name, others[place].fields.find((field) => field.name === name)));
    drawFilters([...fields.values()].filter(Boolean));
  } catch (error) {
    if (error.name !== "AbortError") show($("error"), error.message);
  }
}

function drawFilters(fields) {
  const held = document.activeElement?.id;
  const telling = fields.filter((field) => field.name in state.filters || field.kind === "number" ? field.least !== field.greatest || field.name in state.filters
    : field.values.length > 1 && field.values[0].items > 1);
  $("facets").replaceChildren(...telling.map((field) => field.kind === "number" ? range(field) : values(field)));
  if (held) $(held)?.focus();
  const count = Object.keys(state.filters).length;
  $("active").textContent = count ? `(${count} set)` : "";
  $("clear").hidden = !count;
}

function values(field) {
  const set = made("fieldset"), chosen = state.filters[field.name] ?? new Set();
  set.append(made("legend", field.name));
  const shown = new Map(field.values.map(({ value, items }) => [value, items]));
  for (const value of chosen) if (!shown.has(value)) shown.set(value, 0);
  for (const [value, items] of shown) {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.id = `f-${field.name}-${value}`;
    box.checked = chosen.has(value);
    box.addEventListener("change", () => {
      const now = new Set(state.filters[field.name]);
      now[box.checked ? "add" : "delete"](value);
      if (now.size) state.filters[field.name] = now; else delete state.filters[field.name];
      changed();
    });
    label.append(box, made("span", String(value)), made("small", items.toLocaleString("en")));
    set.append(label);
  }
  if (field.distinct > shown.size) set.append(made("small", `and ${(field.distinct - shown.size).toLocaleString("en")} more`));
  return set;
}

function range(field) {
  const set = made("fieldset"), row = made("div");
  set.append(made("legend", field.name), row);
  row.className = "range";
  const bounds = state.filters[field.name] ?? {};
  for (const [bound, told, end] of [["gte", "from", field.least], ["lte", "to", field.greatest]]) {
    const input = document.createElement("input");
    input.type = "number";
    input.step = "any";
    input.id = `f-${field.name}-${bound}`;
    input.placeholder = end ?? "";
    input.value = bounds[bound] ?? "";
    input.setAttribute("aria-label", `${field.name} ${told}`);
    input.addEventListener("change", () => {
      const now = { ...state.filters[field.name] };
      if (input.value === "") delete now[bound]; else now[bound] = Number(input.value);
      if (Object.keys(now).length) state.filters[field.name] = now; else delete state.filters[field.name];
      changed();
    });
    row.append(made("span", told), input);
  }
  return set;
}

function changed() { count(); search(); }

// --- the release --------------------------------------------------------------------------------

async function watch() {
  if (document.hidden && release) return;
  let told;
  try {
    told = await ask("release");
  } catch (error) {
    $("dot").className = "dot waiting";
    $("badge").textContent = $("keyed").hidden ? "the endpoint does not answer" : "the endpoint wants a key";
    return;
  }
  const before = release?.model.version;
  release = told;
  const next = told.candidate;
  $("dot").className = next ? "dot waiting" : "dot live";
  $("badge").textContent = `${told.model.name} version ${told.model.version}` + (next ? `; version ${next.version}: ${next.state}` : "");
  const rows = [["version", told.model.version], ["live since", told.since], ["index", told.index_key.slice(0, 12)],
    ["products", told.items.toLocaleString("en")], ["shards", told.shards], ["in memory", told.held.join(", ")]];
  if (next) rows.push([`version ${next.version}`, [next.state, ...next.reasons].join(": ")]);
  if (told.note) rows.push(["note", told.note]);
  $("about").replaceChildren(...rows.flatMap(([name, value]) => [made("dt", name), made("dd", String(value))]));
  if (before && before !== told.model.version) changed();
}

// --- the address, which can be shared -----------------------------------------------------------

function save() {
  const parts = new URLSearchParams();
  if (state.query) parts.set("q", state.query);
  if (state.like) parts.set("like", JSON.stringify([state.like.item_id, state.like.title]));
  const filter = conditions();
  if (filter) parts.set("f", JSON.stringify(filter));
  if (state.weight !== null) parts.set("w", state.weight);
  if (state.sides.length > 1) parts.set("sides", state.sides.join(","));
  history.replaceState(null, "", parts.size ? `#${parts}` : location.pathname);
}

function load() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.query = parts.get("q") ?? "";
  state.weight = parts.has("w") ? Number(parts.get("w")) : null;
  state.sides = parts.get("sides")?.split(",").slice(0, 2) ?? ["fused"];
  try {
    const like = JSON.parse(parts.get("like"));
    state.like = like && { item_id: like[0], title: like[1] };
    const filter = Object.entries(JSON.parse(parts.get("f")) ?? {});
    state.filters = Object.fromEntries(filter.map(([name, is]) => [name, Array.isArray(is) ? new Set(is) : is]));
  } catch { // an address that was broken on its way
    state.like = null;
    state.filters = {};
  }
  $("query").value = state.query;
  $("compare").checked = state.sides.length > 1;
  weigh();
}

function weigh() {
  $("weight").value = state.weight ?? 0.5;
  const photo = Math.round(100 * state.weight);
  $("weighed").textContent = state.weight === null ? "as the model fuses them" : `text ${100 - photo} %, photo ${photo} %`;
  $("fused").hidden = state.weight === null;
}

// --- what a person does -------------------------------------------------------------------------

let pause = 0;
$("query").addEventListener("input", () => {
  state.query = $("query").value.trim();
  state.like = null;
  clearTimeout(pause);
  pause = setTimeout(search, PAUSE_MS);
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(pause); search(); });
$("keyed").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.replace(/[^!-~]/g, ""));
  $("key").value = "";
  $("keyed").hidden = true;
  show($("error"), "");
  watch().then(changed);
});
$("facets").addEventListener("submit", (event) => event.preventDefault());
$("weight").addEventListener("input", () => { state.weight = Number($("weight").value); weigh(); clearTimeout(pause); pause = setTimeout(search, PAUSE_MS); });
$("fused").addEventListener("click", () => { state.weight = null; weigh(); $("weight").focus(); search(); });
$("compare").addEventListener("change", () => { state.sides = $("compare").checked ? ["fused", "text"] : ["fused"]; search(); });
$("clear").addEventListener("click", () => { state.filters = {}; $("query").focus(); changed(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName)) { event.preventDefault(); $("query").focus(); }
  if (event.key === "Escape") $("release").open = false;
});
document.addEventListener("click", (event) => { if (!$("release").contains(event.target)) $("release").open = false; });
addEventListener("hashchange", () => { load(); changed(); });

if (matchMedia("(max-width: 760px)").matches) $("filters").open = false;
load();
count();
watch().then(search);
setInterval(watch, RELEASE_EVERY_MS);
