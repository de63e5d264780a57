// A sandboxed document; it only posts its height to the demo.
const frame = element.querySelector("iframe");
const show = () => {
  if (!props.value.document) frame.style.height = "0";
  frame.srcdoc = props.value.document;
};
window.addEventListener("message", (event) => {
  const height = Number(event.data?.height);
  if (event.source !== frame.contentWindow || !props.value.document || !(height > 0)) return;
  frame.style.height = `${Math.min(height, 20000)}px`;
});
watch("value", show);
show();
