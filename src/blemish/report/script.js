"use strict";
// Shows, sorts and filters what page.py computed; thresholds, promises and intervals come from there.
const $ = (id) => document.getElementById(id);
const read = (id) => JSON.parse($(id).textContent);
const { steps, own, kinds, good, histogram, curves } = read("facts");
const pictures = read("pictures");
const rows = read("rows").map(([path, kind, score, p, q, file, heatmap, mask, showable, label, part], place) => ({
  path, kind: kind === null ? null : kinds[kind], score, p, q, file, heatmap, mask, label, part, place,
  source: heatmap || (showable ? file : ""), pictures: pictures[place] || {},
}));
const hasTruth = kinds.length > 0;
const PAGE = 24;
const VERDICTS = {
  missed: ["◆", "Missed defect"], alarm: ["▲", "False alarm"], hit: ["▲", "Correctly flagged"],
  pass: ["●", "Correctly passed"], flagged: ["▲", "Flagged"], passed: ["●", "Passed"],
};
const VIEWS = { observed: "observed", expected: "expected", heat: "heat map", mask: "mask", truth: "truth" };
const SORTS = {
  "interest": (a, b) => a.place - b.place,
  "score-down": (a, b) => b.score - a.score, "score-up": (a, b) => a.score - b.score,
  "p-up": (a, b) => a.p - b.p, "p-down": (a, b) => b.p - a.p,
  "name-up": (a, b) => byName.compare(a.path, b.path), "name-down": (a, b) => byName.compare(b.path, a.path),
};
const byName = new Intl.Collator("en", { numeric: true });
let now = own; // the slider's position
let page = 0;
let shown = []; // rows on the current page

if (!hasTruth) SORTS.interest = SORTS["score-down"];

function verdict(row, step = steps[now]) {
  const flagged = row.score > step.thresholds[row.part];
  if (!hasTruth || row.kind === null) return flagged ? "flagged" : "passed";
  if (row.kind === good) return flagged ? "alarm" : "pass";
  return flagged ? "hit" : "missed";
}

const number = (value, digits = 4) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(digits)));
const many = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

// ---- decisions ----
function decide() {
  const step = steps[now];
  const tally = { missed: 0, alarm: 0, hit: 0, pass: 0, flagged: 0, passed: 0 };
  let changed = 0;
  for (const row of rows) {
    tally[verdict(row)] += 1;
    changed += verdict(row) !== verdict(row, steps[own]);
  }
  const flagged = tally.alarm + tally.hit + tally.flagged;
  const counts = hasTruth
    ? [[tally.missed, `missed of ${many(tally.missed + tally.hit, "defect")}`],
       [tally.alarm, `false alarm${tally.alarm === 1 ? "" : "s"} of ${many(tally.alarm + tally.pass, "good image")}`]]
    : [];
  counts.push([flagged, `flagged of ${many(rows.length, "image")}`]);
  $("counts").replaceChildren(...counts.map(([n, words]) => element("li", {}, element("b", { textContent: n.toLocaleString("en") }), ` ${words}`)));
  $("alpha-now").textContent = `alpha = ${step.alpha}`;
  const said = step.thresholds.length === 1 ? `threshold ${number(step.thresholds[0])}` : `${step.thresholds.length} thresholds, one for each class`;
  $("threshold-now").textContent = `${said}${now === own ? ", the card's own" : ""}${step.promised ? "" : " – no promise"}`;
  $("promise").textContent = step.words;
  $("promise").classList.toggle("broken", !step.promised);
  $("normals").textContent = step.normals && `False alarms: ${step.normals}`;
  $("alpha").setAttribute("aria-valuetext", `alpha ${step.alpha}${step.promised ? "" : ", no promise"}`);
  $("reset").disabled = now === own;
  const differ = changed ? `${many(changed, "decision")} differ${changed === 1 ? "s" : ""} from the card's.` : "The card's own decisions.";
  $("outcome").textContent = `${counts.map(([n, words]) => `${n} ${words}`).join(", ")}. ${differ}`;
}

// ---- gallery ----
function choose() {
  const text = $("text").value.trim().toLowerCase();
  const kind = $("kind")?.value ?? "";
  const wanted = $("verdict").value;
  return rows
    .filter((row) => (!text || row.path.toLowerCase().includes(text)) && (!kind || row.kind === kinds[kind]) && (!wanted || verdict(row) === wanted))
    .sort((a, b) => SORTS[$("sort").value](a, b) || a.place - b.place);
}

function showGallery() {
  const chosen = choose();
  const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
  page = Math.min(page, pages - 1);
  const next = chosen.slice(page * PAGE, (page + 1) * PAGE);
  if (next.length !== shown.length || next.some((row, i) => row !== shown[i])) {
    shown = next;
    $("gallery").replaceChildren(...shown.map(makeItem));
  }
  shown.forEach((row, i) => badge($("gallery").children[i].querySelector(".badge"), row));
  $("found").textContent = chosen.length ? many(chosen.length, "image") : "No image matches these filters.";
  $("page").textContent = `Page ${page + 1} of ${pages}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page === pages - 1;
}

function badge(place, row) {
  const [shape, word] = VERDICTS[verdict(row)];
  place.className = `badge ${verdict(row)}`;
  place.textContent = `${shape} ${word}`;
}

function image(row, view, source = row.pictures[view]) {
  return element("img", { src: source, loading: "lazy", decoding: "async", alt: `${VIEWS[view]} of ${row.path}` });
}

function withHeat(row, view) {
  const parts = [image(row, view)];
  if (view === "observed" && row.pictures.heat) parts.push(element("img", { src: row.pictures.heat, alt: "", className: "overlay" }));
  return parts;
}

function makeItem(row) {
  const item = $("item").content.cloneNode(true).firstElementChild;
  const main = item.querySelector(".main");
  const views = Object.keys(VIEWS).filter((view) => row.pictures[view]);
  if (views.length) {
    main.append(...withHeat(row, views[0]));
    main.onclick = () => enlarge(row, VIEWS[views[0]], withHeat(row, views[0]));
    item.querySelector(".views").append(...views.slice(1).map((view) => element(
      "button", { type: "button", onclick: () => enlarge(row, VIEWS[view], [image(row, view)]) },
      image(row, view), VIEWS[view],
    )));
  } else if (row.source) {
    const view = row.heatmap ? "heat" : "observed";
    main.append(image(row, view, row.source));
    main.onclick = () => enlarge(row, VIEWS[view], [image(row, view, row.source)]);
  } else {
    main.replaceWith(element("div", { className: "main none" }, "no picture to show"));
  }
  main.ariaLabel = `Enlarge ${row.path}`;
  const parts = row.path.split(/[\\/]/);
  item.querySelector("h3").append(parts.pop(), element("small", { textContent: parts.slice(-3).join(" / ") }));
  item.querySelector("h3").title = row.path;
  item.querySelector(".kind").textContent = [row.kind, row.label].filter(Boolean).join(" · ");
  item.querySelector(".numbers").textContent =
    `score ${number(row.score)} · p\u00a0=\u00a0${number(row.p, 3)}${row.q === null ? "" : ` · q\u00a0=\u00a0${number(row.q, 3)}`}`;
  item.querySelector(".links").append(...links(row));
  return item;
}

function links(row) {
  return [["original", row.file], ["heat map", row.heatmap], ["mask", row.mask]]
    .filter(([, address]) => address)
    .map(([word, address]) => element("a", { href: address, textContent: word, ariaLabel: `${word} of ${row.path}` }));
}

function enlarge(row, view, parts) {
  $("large-title").textContent = `${view}: ${row.path}`;
  $("large-pictures").replaceChildren(...parts);
  $("large-links").replaceChildren(`${VERDICTS[verdict(row)][1]}, score ${number(row.score)}, p = ${number(row.p, 3)}. `, ...links(row).flatMap((link) => [link, " "]));
  $("large").showModal();
}

// ---- plots ----
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true };

function draw(id, traces, x, y) {
  const axis = (title, more) => ({
    title: { text: title }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, fixedrange: true, automargin: true, ...more,
  });
  Plotly.react($(id), traces, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", dragmode: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--text") },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text") } },
    margin: { l: 52, r: 16, t: 8, b: 48 }, legend: { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top" },
    xaxis: axis(...x), yaxis: axis(...y),
  }, CONFIG);
}

function drawHistogram() {
  const looks = {
    "calibration, good": [css("--calm"), "solid", 0.28], "test, good": [css("--good"), "solid", 0.12],
    "test, defective": [css("--bad"), "dash", 0.12], "predicted": [css("--good"), "solid", 0.12],
  };
  const { edges, groups } = histogram;
  const traces = groups.map(({ name, counts, shares }) => {
    const [colour, dash, opacity] = looks[name];
    const channels = colour.match(/\w\w/g).map((part) => parseInt(part, 16));
    return {
      name, x: edges, y: [...shares, shares.at(-1)], customdata: [...counts, counts.at(-1)],
      mode: "lines", line: { shape: "hv", color: colour, width: 1.75, dash }, fill: "tozeroy", fillcolor: `rgba(${channels}, ${opacity})`,
      hovertemplate: "from %{x:.3g}: %{customdata} images (%{y:.1f} %)",
    };
  });
  const top = 1.12 * Math.max(...groups.flatMap(({ shares }) => shares));
  const { lines, promised } = steps[now];
  lines.forEach((threshold, place) => traces.push({
    name: promised ? "threshold" : "threshold (no promise)", x: [threshold, threshold], y: [0, top], mode: "lines", showlegend: place === 0,
    line: { color: css("--text"), width: lines.length === 1 ? 2 : 1, dash: promised ? "solid" : "dot" }, hovertemplate: `threshold ${number(threshold)}<extra></extra>`,
  }));
  draw("histogram", traces, [histogram.axis, histogram.logarithmic
    ? { type: "log", dtick: "D2", range: [edges[0], edges.at(-1)].map(Math.log10) }
    : { range: [edges[0], edges.at(-1)] }], ["share of the group, %", { range: [0, top] }]);
}

function drawCurves() {
  if (!$("curve-kind")) return;
  const name = $("curve-kind").value;
  const { image_roc: images, pixel_roc: pixels, pro } = curves[name];
  const line = (label, x, y, colour, dash) => ({
    name: label, x, y, mode: "lines", line: { color: colour, dash, width: 2 }, hovertemplate: "%{x:.3f}, %{y:.3f}",
  });
  const roc = [{ ...line("chance", [0, 1], [0, 1], css("--calm"), "dot"), hoverinfo: "skip", hovertemplate: undefined }];
  if (images) roc.push(line("images", images.false_positive_rate, images.true_positive_rate, css("--good"), "solid"));
  if (pixels) roc.push(line("pixels", pixels.false_positive_rate, pixels.true_positive_rate, css("--bad"), "dash"));
  const normals = rows.filter((row) => row.kind === good);
  const defects = rows.filter((row) => row.kind !== good && (!kinds.includes(name) || row.kind === name));
  if (images && normals.length && defects.length) {
    const flagged = (some) => some.filter((row) => row.score > steps[now].thresholds[row.part]).length / some.length;
    roc.push({
      name: "threshold", x: [flagged(normals)], y: [flagged(defects)], mode: "markers", hovertemplate: "%{x:.3f}, %{y:.3f}", cliponaxis: false,
      marker: { size: 12, symbol: "diamond", color: css("--text"), line: { color: css("--panel"), width: 2 } },
    });
  }
  draw("roc", roc, ["false-positive rate", { range: [0, 1.01] }], ["true-positive rate", { range: [0, 1.02] }]);
  const overlap = pro ? [line("PRO", pro.false_positive_rate, pro.overlap, css("--bad"), "solid")] : [];
  if ($("pro")) draw("pro", overlap, ["false-positive rate of pixels", { rangemode: "tozero" }], ["mean overlap", { range: [0, 1.02] }]);
}

// ---- controls ----
function showDecisions() {
  now = Number($("alpha").value);
  decide();
  showGallery();
  drawHistogram();
  drawCurves();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
  drawHistogram();
  drawCurves();
}

function turn(by) {
  page += by;
  showGallery();
  $("gallery-title").focus();
}

$("alpha").oninput = showDecisions;
$("reset").onclick = () => { $("alpha").value = own; showDecisions(); $("alpha").focus(); };
$("curve-kind")?.addEventListener("change", drawCurves);
$("filters").onsubmit = (event) => event.preventDefault();
$("filters").oninput = $("filters").onchange = (event) => {
  if (event.target === $("opacity")) {
    document.documentElement.style.setProperty("--heat", $("opacity").value / 100);
    $("opacity-now").textContent = `${$("opacity").value} %`;
  } else {
    page = 0;
    showGallery();
  }
};
$("previous").onclick = () => turn(-1);
$("next").onclick = () => turn(1);
$("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
let before = "light"; // the theme to return to when paper, which is white, has been served
addEventListener("beforeprint", () => {
  before = document.documentElement.dataset.theme;
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  setTheme("light");
});
addEventListener("afterprint", () => setTheme(before));

$("filters").reset(); // a reloaded page starts anew, as its script does
$("alpha").value = own;
showDecisions();
setTheme(document.documentElement.dataset.theme);
