"use strict";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let token = "";
let last = null; // the image shown, to classify it again with another model

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = "Bearer " + token;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  const text = await answer.text();
  let body = {};
  try { body = text ? JSON.parse(text) : {}; } catch { body = { error: text.slice(0, 200) }; }
  if (!answer.ok) throw new Error(body.error || "the server answered " + answer.status);
  return body;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function chosen() {
  const [name, version] = JSON.parse($("model").value);
  return "v2/models/" + encodeURIComponent(name) + "/versions/" + version;
}

async function status() {
  let text = "not reachable", state = "down";
  try {
    const ready = (await fetch("v2/health/ready")).ok;
    text = ready ? "ready" : "not ready";
    state = ready ? "ready" : "down";
  } catch { /* shown as not reachable */ }
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
  $("status").className = state;
}

async function loadModels() {
  const { models } = await ask("v2/models");
  $("model").replaceChildren();
  for (const { name, versions } of models) {
    for (const version of versions.slice().reverse()) {
      const option = element("option", versions.length > 1 ? name + ", version " + version : name);
      option.value = JSON.stringify([name, version]);
      $("model").append(option);
    }
  }
  if (models.length) await showCard();
}

function fact(term, value) {
  if (value === undefined || value === null || value === "") return;
  $("card").append(element("dt", term), element("dd", value));
}

const shape = (tensor) => tensor.name + " " + (tensor.dtype || tensor.datatype) + " " + tensor.shape.join("×");

async function showCard() {
  const path = chosen();
  $("card").replaceChildren();
  $("masks").replaceChildren();
  for (const id of ["masks-heading", "masks-note"]) $(id).hidden = true;
  $("manifest-link").href = path + "/manifest";
  let card;
  try { card = await ask(path + "/manifest"); } catch (error) {
    try {
      const model = await ask(path);
      fact("Inputs", model.inputs.map(shape).join(", "));
      fact("Outputs", model.outputs.map(shape).join(", "));
    } catch { /* the message below says why */ }
    fact("Manifest", error.message);
    return;
  }
  fact("Architecture", card.arch);
  fact("Inputs", card.inputs.map(shape).join(", "));
  fact("Outputs", card.outputs.map(shape).join(", "));
  fact("Classes", card.labels && card.labels.length);
  fact("Precision", card.precision);
  if (card.parity && card.parity.passed !== undefined) {
    fact("Parity with the trained model", card.parity.passed ? "passed" : "failed");
  }
  const link = (kind) => (card.chain || []).filter((file) => file.kind === kind).pop();
  for (const kind of ["checkpoint", "onnx"]) {
    const from = link(kind);
    if (from) fact(kind === "onnx" ? "From ONNX" : "From checkpoint", from.file + ", sha256 " + from.sha256.slice(0, 16) + "…");
  }
  fact("Artefact", card.artefact.file + ", " + card.artefact.bytes.toLocaleString("en") + " bytes, sha256 " + card.artefact.sha256.slice(0, 16) + "…");
  fact("Made", card.created);
  fact("With", Object.entries(card.versions || {}).map(([k, v]) => k + " " + v).join(", "));
  showMasks((card.certificate && card.certificate.layers) || []);
}

function showMasks(layers) {
  if (!layers.length) return;
  for (const id of ["masks-heading", "masks-note"]) $(id).hidden = false;
  $("masks-count").textContent = "(" + layers.length + " layers)";
  for (const layer of layers) {
    const sigma = typeof layer.sigma === "number" ? layer.sigma : layer.sigma.median;
    const [height, width] = layer.kernel;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 " + width + " " + height);
    svg.setAttribute("aria-hidden", "true");
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const r2 = (x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2;
        const tap = document.createElementNS(SVG, "rect");
        tap.setAttribute("x", x);
        tap.setAttribute("y", y);
        tap.setAttribute("width", 0.96);
        tap.setAttribute("height", 0.96);
        tap.setAttribute("fill", "#fff");
        tap.setAttribute("fill-opacity", sigma === 0 ? +(r2 === 0) : Math.exp(-r2 / (2 * sigma * sigma)));
        svg.append(tap);
      }
    }
    const item = element("li");
    const text = element("span", layer.name);
    text.append(element("br"), element("span", height + "×" + width + ", σ " + sigma.toPrecision(3), "quiet"));
    item.append(svg, text);
    $("masks").append(item);
  }
}

async function classify(file) {
  if (!file) return;
  last = file;
  const result = $("result");
  result.setAttribute("aria-busy", "true");
  $("latency").hidden = true;
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = "The chosen image, " + file.name;
  preview.onload = () => preview.classList.toggle("small", preview.naturalWidth < 128);
  preview.hidden = false;
  $("image-label").firstChild.textContent = "Choose another image";
  try {
    const began = performance.now();
    const answer = await ask(chosen() + "/classify?k=5", {
      method: "POST", body: file, headers: { "Content-Type": file.type || "application/octet-stream" },
    });
    showClasses(answer.classes);
    showTimes(answer.times_ms, performance.now() - began);
  } catch (error) {
    result.replaceChildren(element("p", error.message, "error"));
  }
  result.setAttribute("aria-busy", "false");
}

function showClasses(classes) {
  const list = element("ol", undefined, "classes");
  for (const { label, probability } of classes) {
    const item = element("li");
    const bar = element("div", undefined, "bar");
    bar.setAttribute("aria-hidden", "true");
    const fill = element("span");
    fill.style.width = 100 * probability + "%";
    bar.append(fill);
    item.append(element("span", label, "label"), element("span", (100 * probability).toFixed(1) + " %", "share"), bar);
    list.append(item);
  }
  $("result").replaceChildren(list);
}

function showTimes(times, seen) {
  const rest = Math.max(0, times.total - times.decode - times.queue - times.compute);
  const stages = [
    ["Decode and preprocess", times.decode, "s1"],
    ["Queue", times.queue, "s2"],
    ["Compute", times.compute, "s3"],
    ["Rest of the server", rest, "s4"],
  ];
  $("split").replaceChildren();
  $("times").replaceChildren();
  const row = (name, value, key, total) => {
    const line = element("tr", undefined, total ? "total" : "");
    const head = element("th");
    head.scope = "row";
    if (key) head.append(element("span", undefined, "key " + key));
    head.append(name);
    line.append(head, element("td", value.toFixed(2) + " ms"));
    $("times").append(line);
  };
  for (const [name, value, key] of stages) {
    const part = element("span", undefined, key);
    part.style.flexGrow = value;
    $("split").append(part);
    row(name, value, key);
  }
  row("Server", times.total, "", true);
  row("As seen by this page", seen, "");
  $("latency").hidden = false;
}

$("image").addEventListener("change", () => { classify($("image").files[0]); $("image").value = ""; });
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  classify(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => classify([...event.clipboardData.files].find((f) => f.type.startsWith("image/"))));
$("model").addEventListener("change", () => { showCard(); classify(last); });
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  start();
});

async function start() {
  status();
  try {
    await loadModels();
    $("token-form").hidden = true;
  } catch (error) {
    $("result").replaceChildren(element("p", error.message, "error"));
  }
}
start();
setInterval(status, 5000);
