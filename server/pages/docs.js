"use strict";

// The page itself is open, what it shows is not: where the server has a key, it is asked for first. The key stays in
// this page's memory and goes into "Authorize", so that "Try it out" sends it too.

const form = document.getElementById("key");
const problem = document.getElementById("problem");

async function load(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(`${document.documentElement.dataset.root}/openapi.json`, { headers });
  const body = await answer.json();
  form.hidden = answer.status !== 401;
  if (answer.ok) {
    problem.textContent = "";
    show(body, key);
  } else if (key || answer.status !== 401) {
    problem.textContent = answer.status === 401 ? "The server does not know this key." : (body.error ?? body).message;
  }
}

function show(spec, key) {
  const ui = SwaggerUIBundle({
    spec,
    dom_id: "#api",
    deepLinking: true,
    validatorUrl: null,
    onComplete: () => key && ui.preauthorizeApiKey("key", key),
  });
}

function failed(error) {
  problem.textContent = `The server did not answer: ${error.message}.`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  load(document.getElementById("value").value).catch(failed);
});

load("").catch(failed);
