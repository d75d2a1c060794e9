// Code and chat, shown as they are written.

onSubmit($("code").querySelector("form"), async () => {
  const target = $("code-answer");
  target.replaceChildren();
  const running = progress(target, $("plan").checked ? "planning, then writing" : "writing");
  const code = element("pre", {tabindex: "0", role: "region", "aria-label": "Code"});
  const body = {prompt: $("prompt").value, plan_then_code: $("plan").checked, stream: true};
  if ($("code-run").value) body.run = $("code-run").value;
  try {
    let answer = null;
    for await (const {event, data} of serverEvents(await send("infer/codegen", {body, signal: running.signal}))) {
      if (event === "error") throw new Error(JSON.parse(data).message);
      if (event === "answer") answer = JSON.parse(data);
      else { if (!code.isConnected) target.append(code); code.textContent += JSON.parse(data); }
    }
    if (!answer) throw new Error("The answer broke off.");
    latency(1000 * running.seconds());
    code.remove();
    code.textContent = answer.code || "(no code)";
    if (answer.plan) target.append(element("h3", {}, "Plan"), withCopy(element("pre", {tabindex: "0", role: "region", "aria-label": "Plan"}, answer.plan)), element("h3", {}, "Code"));
    target.append(withCopy(code), element("p", {class: "quiet"}, answer.model_name + ", " + running.seconds().toFixed(1) + " s"
      + (answer.cut ? ", cut off by the token budget" : "") + (answer.error ? "; not a Python program: " + answer.error : "")));
  } catch (error) {
    target.append(error.name === "AbortError" ? element("p", {}, "Stopped after " + running.seconds().toFixed(1) + " s.") : errorBox(error));
  } finally { running.end(); }
});

let turns = [];

function showTurn(role, title, text) {
  const said = element("pre", {tabindex: "0", role: "region", "aria-label": title}, text);
  const turn = element("div", {class: "turn " + role}, element("h3", {}, title), said);
  $("turns").append(turn);
  return {turn, said};
}

onSubmit($("chat").querySelector("form"), async () => {
  const question = {role: "user", content: $("message").value}, system = $("system").value.trim();
  showTurn("user", "You", question.content);
  const model = $("chat-run").value || "base", {turn, said} = showTurn("assistant", model, "");
  const running = progress(turn, "writing");
  const body = {model, stream: true, stream_options: {include_usage: true}, max_tokens: Number($("chat-tokens").value) || 512,
    messages: [...(system ? [{role: "system", content: system}] : []), ...turns, question]};
  let text = "", reason = null, usage = null, ended = "";
  try {
    for await (const {data} of serverEvents(await send("v1/chat/completions", {body, signal: running.signal}))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      text += chunk.choices[0]?.delta.content || "";
      reason = chunk.choices[0]?.finish_reason || reason;
      said.textContent = text;
    }
    latency(1000 * running.seconds());
    ended = (usage ? usage.completion_tokens + " tokens, " : "") + running.seconds().toFixed(1) + " s"
      + (reason === "length" ? "; cut off by the token budget" : "");
    $("message").value = "";
  } catch (error) {
    if (error.name === "AbortError") ended = "Stopped after " + running.seconds().toFixed(1) + " s.";
    else turn.append(errorBox(error));
  } finally { running.end(); }
  if (ended) {
    turns.push(question, {role: "assistant", content: text});
    said.remove();
    turn.append(withCopy(said), element("p", {class: "quiet"}, ended));
  }
});

$("chat-new").addEventListener("click", () => {
  turns = [];
  $("turns").replaceChildren();
  $("message").focus();
});
