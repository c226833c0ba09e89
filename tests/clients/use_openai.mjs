// The official JavaScript client. Prints its checks as judge.py does.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { createRequire } from "node:module";
import path from "node:path";
import { parseArgs } from "node:util";

const names = ["demo", "exact", "scripted", "key", "out"];
const { values: args } = parseArgs({ options: Object.fromEntries(names.map((name) => [name, { type: "string" }])) });
const require = createRequire(path.join(process.env.CLIENT_ENVIRONMENT, "package.json"));
const OpenAI = require("openai").default ?? require("openai");

const MODEL = "demo";
const PROMPT = "def fib(n):\n";
const MESSAGES = [{ role: "user", content: "import os\n" }];
let failed = 0;

async function check(name, act) {
  const started = performance.now();
  let detail = "";
  try {
    await act();
  } catch (error) {
    detail = String(error.stack ?? error).slice(0, 2000);
    failed += 1;
  }
  const seconds = Math.round((performance.now() - started) / 10) / 100;
  // the reader looks for this very beginning
  const rest = JSON.stringify({ passed: detail === "", seconds, detail }).slice(1);
  console.log(`\n{"check": ${JSON.stringify(name)}, ${rest}`);
}

function client(url, options = {}) {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: args.key, maxRetries: 0, ...options });
}

async function raises(kind, act) {
  try {
    await act();
  } catch (error) {
    assert(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    return error;
  }
  throw new Error("no error");
}

async function everything(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function idle(url) {
  for (let turn = 0; turn < 200; turn += 1) {
    const answer = await fetch(`${url}/metrics`, { headers: { Authorization: `Bearer ${args.key}` } });
    if (/^saccade_running 0(\.0)?$/m.test(await answer.text())) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error("the request goes on in the engine");
}

const demo = client(args.demo);
const chat = { model: MODEL, messages: MESSAGES, max_completion_tokens: 24, seed: 3 };
const complete = { model: MODEL, prompt: PROMPT, max_tokens: 24, seed: 3 };
const content = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join("");

await check("models: list and retrieve", async () => {
  const listed = await everything(await demo.models.list());
  assert.deepEqual(listed.map((model) => model.id), [MODEL]);
  assert.equal((await demo.models.retrieve(MODEL)).id, MODEL);
});

await check("completions: whole, in a stream, logprobs", async () => {
  const whole = await demo.completions.create({ ...complete, logprobs: 1 });
  assert(whole.choices[0].text);
  assert.equal(whole.choices[0].logprobs.tokens.length, whole.usage.completion_tokens);
  const chunks = await everything(await demo.completions.create({ ...complete, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), whole.choices[0].text);
});

await check("chat: whole, in a stream, usage", async () => {
  const whole = await demo.chat.completions.create(chat);
  assert(whole.choices[0].message.content);
  const options = { ...chat, stream: true, stream_options: { include_usage: true } };
  const chunks = await everything(await demo.chat.completions.create(options));
  assert.equal(content(chunks), whole.choices[0].message.content);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
});

await check("chat: the stream() helper", async () => {
  const ended = { ...chat, stop: ["\n"], max_completion_tokens: 200 };
  const whole = await demo.chat.completions.create(ended);
  const runner = demo.chat.completions.stream(ended);
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
});

await check("chat: 16 streams at once", async () => {
  const one = async () => content(await everything(await demo.chat.completions.create({ ...chat, stream: true })));
  const texts = await Promise.all(Array.from({ length: 16 }, one));
  assert.equal(new Set(texts).size, 1);
});

await check("structured output, whole", async () => {
  const schema = {
    type: "object",
    properties: { colour: { enum: ["red", "green", "blue"] }, final: { type: "boolean" } },
    required: ["colour", "final"],
    additionalProperties: false,
  };
  const format = { type: "json_schema", json_schema: { name: "pick", schema, strict: true } };
  const done = await demo.chat.completions.parse({ ...chat, max_completion_tokens: 200, response_format: format });
  assert.deepEqual(Object.keys(JSON.parse(done.choices[0].message.content)).sort(), ["colour", "final"]);
});

await check("responses: whole and in a stream", async () => {
  const ask = { model: MODEL, input: "import os\n", max_output_tokens: 24, temperature: 0 };
  const whole = await demo.responses.create(ask);
  assert(whole.output_text);
  const events = await everything(await demo.responses.create({ ...ask, stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), whole.output_text);
});

await check("unknown model: NotFoundError", async () => {
  const error = await raises(OpenAI.NotFoundError, () => demo.completions.create({ ...complete, model: "nope" }));
  assert.equal(error.code, "model_not_found");
  assert(error.requestID);
});

await check("context overflow: BadRequestError, context_length_exceeded", async () => {
  const error = await raises(OpenAI.BadRequestError, () => demo.completions.create({ ...complete, max_tokens: 5000 }));
  assert.equal(error.code, "context_length_exceeded");
});

await check("a wrong key: AuthenticationError", async () => {
  const error = await raises(OpenAI.AuthenticationError, () => client(args.demo, { apiKey: "sk-wrong" }).models.list());
  assert.equal(error.code, "invalid_api_key");
});

await check("leaving a stream ends its request in the engine", async () => {
  const stream = await demo.completions.create({ ...complete, max_tokens: 1000, ignore_eos: true, stream: true });
  for await (const chunk of stream) {
    assert(chunk.choices);
    break; // which aborts the request
  }
  await idle(args.demo);
});

await check("a timeout: APIConnectionTimeoutError", async () => {
  const hasty = client(args.scripted, { timeout: 500 });
  const slow = { model: MODEL, prompt: "think long" };
  await raises(OpenAI.APIConnectionTimeoutError, () => hasty.completions.create(slow));
  await idle(args.scripted);
});

await check("an overloaded server: InternalServerError, and success with one retry", async () => {
  const busy = () => ({ model: MODEL, prompt: `busy once ${randomUUID()}`, max_tokens: 2 });
  const error = await raises(OpenAI.InternalServerError, () => client(args.scripted).completions.create(busy()));
  assert.equal(error.status, 503);
  const done = await client(args.scripted, { maxRetries: 1 }).completions.create(busy());
  assert(done.choices[0].text);
});

await check("an error in mid-stream: APIError", async () => {
  const stream = await client(args.scripted).completions.create({
    model: MODEL,
    prompt: "fail midway",
    max_tokens: 9,
    stream: true,
  });
  const error = await raises(OpenAI.APIError, () => everything(stream));
  assert.equal(error.code, "internal_error");
});

process.exit(Math.min(failed, 1));
