"use strict";
// Opens a SMART Health Link: everything is decrypted here, with the key behind the #, which no server sees.

const at = (id) => document.getElementById(id);
const tell = (text) => { at("told").textContent = text; };

function bytes(text) {
  const plain = atob(text.replace(/-/g, "+").replace(/_/g, "/"));
  return Uint8Array.from(plain, (letter) => letter.charCodeAt(0));
}

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

async function fetched(link, file, item) {
  const answer = await fetch(file.location);
  if (!answer.ok) throw new Error("This has run out. Open the link again.");
  const [plain, type] = await opened(link, await answer.text());
  // Only what a browser shows without running anything in it is shown; the rest is saved.
  const shows = ["application/pdf", "image/png", "image/jpeg", "text/plain"].includes(type);
  const place = URL.createObjectURL(new Blob([plain], { type: shows ? type : "application/octet-stream" }));
  const link_ = document.createElement("a");
  link_.className = "button";
  link_.href = place;
  link_.download = file.name || "document";
  link_.textContent = "Save";
  item.querySelector("button").replaceWith(link_);
  link_.click();
}

async function open(event) {
  event.preventDefault();
  at("open").disabled = true;
  tell("Opening …");
  try {
    const link = read();
    const asked = { recipient: "a browser" };
    if (link.flag && link.flag.includes("P")) asked.passcode = at("passcode").value;
    const answer = await fetch(link.url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked) });
    const told = await answer.json();
    if (answer.status === 401) throw new Error(`That is not the passcode. Tries left: ${told.remainingAttempts}.`);
    if (!answer.ok) throw new Error(told.error || "This cannot be opened now.");
    at("ask").hidden = true;
    tell(told.files.length === 1 ? "One document." : `${told.files.length} documents.`);
    for (const file of told.files) {
      const item = document.createElement("li");
      const name = document.createElement("span");
      name.textContent = file.name || file.contentType;
      const button = document.createElement("button");
      button.textContent = "Open";
      button.addEventListener("click", () => { button.disabled = true; fetched(link, file, item).catch((error) => tell(error.message)); });
      item.append(name, button);
      at("list").append(item);
    }
  } catch (error) {
    tell(error.message);
    at("open").disabled = false;
  }
}

try {
  const link = read();
  if (link.label) at("title").textContent = link.label;
  at("code").hidden = !(link.flag && link.flag.includes("P"));
  if (link.exp && Date.now() / 1000 > link.exp) { tell("This link has expired."); at("open").disabled = true; }
  at("ask").addEventListener("submit", open);
} catch (error) {
  tell(error.message);
  at("ask").hidden = true;
}
