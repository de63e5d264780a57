// A document of its own, cut off from the page but for its height, which it tells.
const frame = element.querySelector("iframe");
const show = () => {
  if (!props.value) frame.style.height = "0";
  frame.srcdoc = props.value ?? "";
};
window.addEventListener("message", (event) => {
  const height = Number(event.data?.height);
  if (props.value && event.source === frame.contentWindow && height > 0) frame.style.height = `${Math.min(height, 20000)}px`;
});
watch("value", show);
if (props.value) show();
