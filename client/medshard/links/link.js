// A module, so that no function here takes the place of one of the browser's.
// Opens a SMART Health Link: everything is decrypted here, with the key behind the #, which no server sees.

const at = (id) => document.getElementById(id);
const tell = (text, wrong = false) => { at("told").textContent = text; at("told").className = wrong ? "wrong" : ""; };
// Only what a browser shows without running anything in it is shown; the rest is saved.
const shows = ["application/pdf", "image/png", "image/jpeg", "text/plain"];

function bytes(text) {
  const plain = atob(text.replace(/-/g, "+").replace(/_/g, "/"));
  return Uint8Array.from(plain, (letter) => letter.charCodeAt(0));
}

// An error after which trying again helps nobody.
const final = (text) => Object.assign(new Error(text), { final: true });

function read() {
  const found = location.hash.match(/shlink:\/([A-Za-z0-9_-]+)$/);
  if (!found) throw new Error("This link is cut. Copy the whole of it.");
  const link = JSON.parse(new TextDecoder().decode(bytes(found[1])));
  if (new URL(link.url).origin !== location.origin) throw new Error("This link is of another place.");
  return link;
}

async function opened(link, jwe) {
  const [head, , nonce, body, tag] = jwe.trim().split(".");
  const header = JSON.parse(new TextDecoder().decode(bytes(head)));
  if (header.alg !== "dir" || header.enc !== "A256GCM") throw new Error("These documents cannot be opened here.");
  const key = await crypto.subtle.importKey("raw", bytes(link.key), "AES-GCM", false, ["decrypt"]);
  const plain = bytes(body);
  const sealed = new Uint8Array(plain.length + 16);
  sealed.set(plain);
  sealed.set(bytes(tag), plain.length);
  const rules = { name: "AES-GCM", iv: bytes(nonce), additionalData: new TextEncoder().encode(head) };
  return [await crypto.subtle.decrypt(rules, key, sealed), header.cty || "application/octet-stream"];
}

function isUtf8(plain) {
  try { new TextDecoder("utf-8", { fatal: true }).decode(plain); return true; } catch { return false; }
}

// The document as an address within this page, decrypted once and kept until the page is closed.
function fetched(link, file) {
  const fetchIt = async () => {
    const answer = await fetch(file.location);
    if (!answer.ok) throw new Error("This has run out. Open the link again.");
    const [plain, type] = await opened(link, await answer.text());
    const told = type === "text/plain" && isUtf8(plain) ? "text/plain;charset=utf-8" : type;
    return URL.createObjectURL(new Blob([plain], { type: shows.includes(type) ? told : "application/octet-stream" }));
  };
  file.place = file.place || fetchIt().catch((error) => { file.place = null; throw error; });
  return file.place;
}

async function save(link, file) {
  const away = document.createElement("a");
  away.href = await fetched(link, file);
  away.download = file.name || "document";
  away.click();
}

async function view(link, file) {
  const tab = window.open("", "_blank");  // now, while a click is being answered, or it would be blocked
  try {
    const place = await fetched(link, file);
    if (tab) tab.location = place; else await save(link, file);
  } catch (error) {
    if (tab) tab.close();
    throw error;
  }
}

function button(text, label, act) {
  const made = document.createElement("button");
  made.textContent = text;
  made.setAttribute("aria-label", `${text} ${label}`);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try { await act(); tell(""); } catch (error) { tell(error.message, true); }
    made.disabled = false;
  });
  return made;
}

function size(count) {
  if (!count) return "";
  const power = Math.min(3, Math.floor(Math.log(count) / Math.log(1024)));
  return `${(count / 1024 ** power).toFixed(power && count / 1024 ** power < 10 ? 1 : 0)} ${["B", "KB", "MB", "GB"][power]}`;
}

function listed(link, file) {
  const item = document.createElement("li");
  const [kind, name, small, acts] = ["span", "span", "small", "span"].map((tag) => document.createElement(tag));
  const known = { "application/pdf": "PDF", "application/dicom": "SCAN", "image/png": "IMAGE", "image/jpeg": "IMAGE", "text/plain": "TEXT" };
  [kind.className, name.className, acts.className] = ["kind", "name", "acts"];
  kind.textContent = known[file.contentType] || "FILE";
  name.textContent = file.name || "A document without a name";
  small.textContent = size(file.size);
  name.append(small);
  if (shows.includes(file.contentType)) acts.append(button("View", name.textContent, () => view(link, file)));
  acts.append(button("Save", file.name || "document", () => save(link, file)));
  item.append(kind, name, acts);
  return item;
}

async function unlock(event) {
  event.preventDefault();
  at("open").disabled = true;
  tell("Opening …");
  try {
    const link = read();
    const asked = { recipient: "a browser" };
    if (link.flag && link.flag.includes("P")) asked.passcode = at("passcode").value;
    const answer = await fetch(link.url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked) });
    const told = await answer.json();
    if (answer.status === 401) {
      const left = told.remainingAttempts;
      const more = left === 1 ? "One try is left." : `${left} tries are left.`;
      throw left ? new Error(`That is not the passcode. ${more}`) : final("That was not the passcode, and the last try: this link is locked.");
    }
    if (answer.status === 404) throw final(`${told.error[0].toUpperCase()}${told.error.slice(1)}.`);
    if (!answer.ok) throw new Error("This cannot be opened just now. Try again later.");
    at("ask").hidden = true;
    at("about").textContent = told.files.length === 1 ? "One document, decrypted on this device." : `${told.files.length} documents, decrypted on this device.`;
    tell("");
    at("list").append(...told.files.map((file) => listed(link, file)));
    at("all").hidden = told.files.length < 2;
    at("all").addEventListener("click", async () => {
      try { for (const file of told.files) await save(link, file); } catch (error) { tell(error.message, true); }
    });
  } catch (error) {
    tell(error.message, true);
    at("open").disabled = Boolean(error.final);
    at("passcode").select();
  }
}

try {
  const link = read();
  if (link.label) { at("title").textContent = link.label; document.title = link.label; }
  at("code").hidden = !(link.flag && link.flag.includes("P"));
  if (link.exp) {
    at("until").textContent = `The link opens until ${new Date(link.exp * 1000).toLocaleString([], { dateStyle: "long", timeStyle: "short" })}.`;
    at("until").hidden = false;
  }
  if (link.exp && Date.now() / 1000 > link.exp) { tell("This link has expired. Ask for a new one.", true); at("open").disabled = true; }
  at("ask").addEventListener("submit", unlock);
} catch (error) {
  tell(error instanceof SyntaxError ? "This link is cut. Copy the whole of it." : error.message, true);
  at("ask").hidden = true;
}
