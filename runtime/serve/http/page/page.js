"use strict";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let token = "";
let image = null; // { file, note }: the image shown, classified again when another model is chosen
let listed = ""; // the server's list of models as the picker shows it
let refusals = {}; // option of the picker -> why the server classifies no image with it, in the server's words
const running = {}; // task name -> the AbortController of its newest run

/** An error whose message is a sentence for the person at the page. */
class Told extends Error {}

/** The signal of a new run of `task`. Gives up the run before, so that an answer that comes late is never shown. */
function begin(task) {
  if (running[task]) running[task].abort();
  running[task] = new AbortController();
  return running[task].signal;
}

/** The text of a successful answer; throws Told. */
async function read(path, options = {}) {
  const headers = { ...options.headers };
  // A header holds bytes, one character each; the server compares the token's UTF-8.
  if (token) headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(token));
  let answer, text;
  try {
    answer = await fetch(path, { ...options, headers });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told("The server cannot be reached, or it broke off the connection.");
  }
  if (answer.status === 401) askForToken();
  if (!answer.ok) throw new Told(refusal(answer, text));
  return text;
}

function refusal(answer, text) {
  let why;
  try { why = JSON.parse(text).error; } catch { /* no JSON: something else than the server answered, or nothing */ }
  if (!why || typeof why !== "string") why = `the server answered with status ${answer.status} and did not say why`;
  const seconds = Number(answer.headers.get("Retry-After"));
  const again = seconds > 0 ? ` Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.` : "";
  return sentence(why) + again;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function parse(text) {
  try { return JSON.parse(text); } catch { throw new Told("The server's answer is not JSON and could not be read."); }
}

const ask = async (path, options) => parse(await read(path, options));

const plain = (error) => error instanceof Told ? error.message : "The server's answer could not be understood.";

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** One sentence above the classes, announced by a screen reader; nothing happens where it stands already. */
function say(text, className = "quiet") {
  if ($("result").textContent !== text) $("result").replaceChildren(element("p", text, className));
}

/** Mark a panel whose content is gone as busy; it keeps its height, so that nothing below it jumps. */
function hold(panel) {
  panel.style.minHeight = panel.getBoundingClientRect().height + "px";
  panel.setAttribute("aria-busy", "true");
}

function settle(panel) {
  panel.style.minHeight = "";
  panel.setAttribute("aria-busy", "false");
}

// --- the server and its models ---

async function watch() {
  let text = "not reachable", state = "down";
  try {
    const ready = (await fetch("v2/health/ready", { signal: AbortSignal.timeout(5000) })).ok;
    // Not the first few of a server that is still loading: one of them would be chosen, or an old version.
    if ((ready || listed) && $("token-form").hidden) await loadModels();
    state = ready ? "ready" : listed ? "down" : "loading";
    text = { ready: "ready", down: "not ready", loading: "loading the models" }[state];
  } catch { /* shown as not reachable */ }
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
  $("status").className = state;
  setTimeout(watch, state === "ready" ? 5000 : 1000);
}

/** Let the picker show what the server holds now: a reload brings and takes models. */
async function loadModels() {
  let models;
  try { ({ models } = await ask("v2/models")); } catch (error) {
    if ($("token-form").hidden && !listed) say(plain(error), "error");
    return;
  }
  const found = JSON.stringify(models);
  if (found === listed) return;
  listed = found;
  const before = $("model").value, refused = refusals[before];
  $("model").replaceChildren();
  refusals = {};
  for (const { name, versions, takes_no_images = {} } of models) {
    for (const version of versions.slice().reverse()) {
      const value = JSON.stringify([name, version]);
      const text = versions.length > 1 ? name + ", version " + version : name;
      $("model").append(new Option(text, value, false, value === before));
      refusals[value] = takes_no_images[version];
    }
  }
  $("model").disabled = !models.length;
  if (!models.length) $("model").append(new Option("none yet", ""));
  if ($("model").value !== before || refusals[before] !== refused) choose();
}

/** The URL of the chosen model version, or "" where there is none yet. */
function chosen() {
  if (!$("model").value) return "";
  const [name, version] = JSON.parse($("model").value);
  return "v2/models/" + encodeURIComponent(name) + "/versions/" + version;
}

function choose() {
  const why = refusals[$("model").value];
  $("model-note").textContent = why ? sentence(why) : "";
  for (const id of ["skip", "drop", "result-panel"]) $(id).hidden = !!why;
  document.title = $("heading").textContent = why ? "A served model" : "Classify an image";
  $("image-heading").textContent = why ? "Tensors" : "Image";
  showCard();
  classify();
}

function askForToken() {
  const note = token ? "The server did not accept this token." : "This server asks for a bearer token.";
  $("token-note").replaceChildren(element("span", note, token ? "error" : "quiet"));
  $("token-form").hidden = false;
  $("token").focus();
  $("token").select();
}

async function useToken() {
  token = $("token").value;
  $("token-form").hidden = true;
  await loadModels();
  if (!$("token-form").hidden) return;
  $("image").focus();
  try { offer("openapi-link", "openapi.json", await read("openapi.json")); } catch { /* the plain link stays */ }
}

/** Point a link at a document. A browser sends no token when it follows a link, so with one it gets the text itself. */
function offer(id, path, text) {
  const link = $(id);
  if (link.href.startsWith("blob:")) URL.revokeObjectURL(link.href);
  link.href = token ? URL.createObjectURL(new Blob([text], { type: "application/json" })) : path;
  link.hidden = false;
}

// --- the model card ---

function fact(term, value) {
  if (value === undefined || value === null || value === "") return;
  $("card").append(element("dt", term), element("dd", value));
}

const shape = (tensor) => tensor.name + " " + (tensor.dtype || tensor.datatype) + " " + tensor.shape.join("×");
const digest = (file) => "sha256 " + file.sha256.slice(0, 16) + "…";

async function showCard() {
  const signal = begin("card");
  const path = chosen();
  hold($("card-panel"));
  $("card").replaceChildren();
  for (const id of ["masks-part", "manifest-link"]) $(id).hidden = true;
  let card = null, model = null, problem = "";
  if (path) {
    try {
      const text = await read(path + "/manifest", { signal });
      card = parse(text);
      offer("manifest-link", path + "/manifest", text);
    } catch (error) {
      if (signal.aborted) return;
      problem = plain(error);
      try { model = await ask(path, { signal }); } catch { if (signal.aborted) return; }
    }
  }
  if (card) showManifest(card);
  else if (path) showSignature(model, problem);
  else fact("Model", "none yet");
  settle($("card-panel"));
}

function showSignature(model, problem) {
  if (model) fact("Inputs", model.inputs.map(shape).join(", "));
  if (model) fact("Outputs", model.outputs.map(shape).join(", "));
  fact("Manifest", problem);
}

function showManifest(card) {
  fact("Architecture", card.arch);
  fact("Inputs", card.inputs.map(shape).join(", "));
  fact("Outputs", card.outputs.map(shape).join(", "));
  if (!refusals[$("model").value]) {
    if (card.outputs.length > 1) fact("Classes are read from", card.outputs[0].name);
    fact("Classes", card.labels ? card.labels.length : "without names; shown by their index");
  }
  const prepared = card.preprocessing;
  if (prepared) {
    const { size, channel_order, resize, interpolation } = prepared;
    fact("Image", `${size.join("×")} ${channel_order}, ${resize}, ${interpolation}`);
  }
  const found = Object.entries(card.precision_found || {}).map(([kind, count]) => count + " " + kind).join(", ");
  fact("Precision", card.precision + (found && "; layers found: " + found));
  if (card.parity && card.parity.result) {
    const against = card.parity.reference;
    fact("Parity with " + (typeof against === "string" && against ? against : "the trained model"), card.parity.result);
  }
  for (const [kind, term] of [["checkpoint", "From checkpoint"], ["onnx", "From ONNX"]]) {
    const from = (card.chain || []).filter((link) => link.kind === kind).pop();
    if (from) fact(term, from.file + ", " + digest(from));
  }
  const { file, bytes } = card.artefact;
  fact("Artefact", `${file}, ${bytes.toLocaleString("en")} bytes, ${digest(card.artefact)}`);
  fact("Made", (card.created || "").replace("T", " ").replace("+00:00", " UTC"));
  fact("With", Object.entries(card.versions || {}).map(([k, v]) => k + " " + v).join(", "));
  showMasks((card.certificate && card.certificate.layers) || []);
}

function showMasks(layers) {
  $("masks").replaceChildren();
  $("masks-part").hidden = !layers.length;
  $("masks-count").textContent = "(" + layers.length + (layers.length === 1 ? " layer)" : " layers)");
  for (const layer of layers) {
    const sigma = typeof layer.sigma === "number" ? layer.sigma : layer.sigma.median;
    const [height, width] = layer.kernel;
    const item = element("li");
    const text = element("span", layer.name);
    text.append(element("br"), element("span", height + "×" + width + ", σ " + sigma.toPrecision(3), "quiet"));
    item.append(drawMask(height, width, sigma), text);
    $("masks").append(item);
  }
}

function drawMask(height, width, sigma) {
  const gap = 0.06; // between taps and around them, in taps
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", [-gap, -gap, width + gap, height + gap].join(" "));
  svg.setAttribute("aria-hidden", "true");
  const variance = Math.max(sigma * sigma, 1e-4); // the floor of gmconv.gaussian_mask
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const r2 = (x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2;
      const tap = document.createElementNS(SVG, "rect");
      tap.setAttribute("x", x);
      tap.setAttribute("y", y);
      tap.setAttribute("width", 1 - gap);
      tap.setAttribute("height", 1 - gap);
      tap.setAttribute("fill-opacity", Math.exp(-r2 / (2 * variance)));
      svg.append(tap);
    }
  }
  return svg;
}

// --- the image and its classes ---

/** Take what was chosen, dropped or pasted: the first image, with a word about the rest. */
function take(files) {
  const file = files.find((f) => f.type.startsWith("image/")) || files[0];
  if (!file) return;
  image = { file, note: files.length > 1 ? ` ${files.length} files came at once; only this one was taken.` : "" };
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = "The chosen image, " + file.name;
  $("image-label").firstChild.textContent = "Choose another image";
  classify();
}

async function classify() {
  if (!image || refusals[$("model").value]) return;
  const { file, note } = image;
  const signal = begin("classify");
  const panel = $("result-panel");
  const path = chosen();
  hold(panel);
  $("classes").replaceChildren();
  $("latency").hidden = true;
  try {
    if (path) {
      say("Classifying " + file.name + "…");
      await check(file);
      const began = performance.now();
      const headers = { "Content-Type": file.type || "application/octet-stream" };
      const answer = await ask(path + "/classify?k=5", { method: "POST", body: file, headers, signal });
      showTimes(answer.times_ms, performance.now() - began);
      showClasses(answer.classes);
      say(verdict(file.name, answer) + note);
    } else {
      say(`${whyNotYet()}; ${file.name} will be classified after that.${note}`);
    }
  } catch (error) {
    if (signal.aborted) return;
    say(plain(error), "error");
  }
  settle(panel);
}

/** Tell a file that cannot be read from a server that cannot be reached: `fetch` throws the same for both. */
async function check(file) {
  try { await file.slice(0, 1).arrayBuffer(); } catch {
    throw new Told(file.name + " cannot be read: it is a folder, or the file is gone or locked.");
  }
}

function whyNotYet() {
  if (!$("token-form").hidden) return "This server asks for a bearer token";
  if ($("status-text").textContent === "not reachable") return "The server cannot be reached";
  return "The models are still loading";
}

const named = ({ label, index }) => label === String(index) ? "class " + index : label;

function verdict(name, { classes, model_name, model_version }) {
  const by = `${model_name}, version ${model_version}`;
  const [top] = classes;
  // The server gives probability 0 to every class where the network returned nothing but NaN.
  if (!top || !top.probability) return `For ${name}, ${by} returned no usable scores: none is a number.`;
  return `${name} is most probably ${named(top)} (${percent(top.probability)}), says ${by}.`;
}

function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1\u00a0%";
  return share < 1 && share >= 0.9995 ? ">99.9\u00a0%" : (100 * share).toFixed(1) + "\u00a0%";
}

function showClasses(classes) {
  for (const entry of classes) {
    const item = element("li");
    const bar = element("div", undefined, "bar");
    bar.setAttribute("aria-hidden", "true");
    const fill = element("span");
    fill.style.width = 100 * entry.probability + "%";
    bar.append(fill);
    item.append(element("span", named(entry), "label"), element("span", percent(entry.probability), "share"), bar);
    $("classes").append(item);
  }
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

// --- what a person does ---

$("preview").addEventListener("load", () => {
  $("preview").classList.toggle("small", $("preview").naturalWidth < 128);
  $("preview").hidden = false;
});
$("preview").addEventListener("error", () => { $("preview").hidden = true; });
$("image").addEventListener("change", () => { take([...$("image").files]); $("image").value = ""; });
// Anywhere in the window: a file let go beside the zone would otherwise replace the page by that file.
const typing = (event) => event.target === $("token") && !event.dataTransfer.types.includes("Files");
window.addEventListener("dragover", (event) => {
  if (typing(event)) return;
  event.preventDefault();
  $("drop").classList.toggle("over", event.dataTransfer.types.includes("Files"));
});
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
window.addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  if (typing(event)) return;
  event.preventDefault();
  const files = [...event.dataTransfer.files];
  if (files.length) take(files);
  else say("That was not a file: save the image first, then choose or drop it.", "error");
});
window.addEventListener("paste", (event) => {
  take([...event.clipboardData.files].filter((file) => file.type.startsWith("image/")));
});
$("model").addEventListener("change", choose);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken();
});
watch();
